"""A bounded store of things that are costly to make again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
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
        return self.get_all([key], lambda _: [make()])[0]

    def get_all(self, keys: Sequence[Key], make: Callable[[list[Key]], Iterable[Value]]) -> list[Value]:
        """The keys' values; those that are not kept are made together, each once."""
        with self._making:
            with self._lock:
                found = {key: self._values[key] for key in keys if key in self._values}
                for key in found:
                    self._values.move_to_end(key)
            missing = [key for key in dict.fromkeys(keys) if key not in found]
            made = dict(zip(missing, make(missing), strict=True)) if missing else {}
            with self._lock:
                for key, value in made.items():
                    self._values[key] = value
                    self._used += self._size(value)
                while self._used > self._budget:
                    self._used -= self._size(self._values.popitem(last=False)[1])
            found |= made
            return [found[key] for key in keys]

    def forget(self, gone: Callable[[Key], bool]) -> None:
        """Drop what nobody will ask for again, without waiting for what is being made."""
        with self._lock:
            for key in [key for key in self._values if gone(key)]:
                self._used -= self._size(self._values.pop(key))
