"""A bounded store of things that are costly to make again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Keeps the values used last, as many as fit the budget; one that is larger than all of it is made and not kept."""

    def __init__(self, budget: int, size: Callable[[Value], int]) -> None:
        """budget and ``size(value)`` are in the same unit, say bytes."""
        self._budget, self._size, self._used = budget, size, 0
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The kept value, or a new one; those not used for longest leave."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            value = self._values[key] = make()
            self._used += self._size(value)
            while self._used > self._budget:
                self._used -= self._size(self._values.popitem(last=False)[1])
            return value
