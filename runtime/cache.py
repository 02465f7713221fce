"""A bounded store of things that are costly to make again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Keeps the values used last, as many as fit the budget; one that is larger than all of it is made and not kept."""

    def __init__(self, budget: int, size: Callable[[Value], int]) -> None:
        """budget and ``size(value)`` are in the same unit, say bytes."""
        self._budget, self._size, self._used = budget, size, 0
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._making, self._lock = threading.Lock(), threading.Lock()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The kept value, or a new one, made once for all who wait for it; those not used for longest leave."""
        with self._making:
            with self._lock:
                if key in self._values:
                    self._values.move_to_end(key)
                    return self._values[key]
            value = make()
            with self._lock:
                self._values[key] = value
                self._used += self._size(value)
                while self._used > self._budget:
                    self._used -= self._size(self._values.popitem(last=False)[1])
            return value

    def forget(self, gone: Callable[[Key], bool]) -> None:
        """Drop what nobody will ask for again, without waiting for what is being made."""
        with self._lock:
            for key in [key for key in self._values if gone(key)]:
                self._used -= self._size(self._values.pop(key))
