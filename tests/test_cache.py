"""The bounded store."""

from __future__ import annotations

import threading

from stylemuse.requests.cache import Recent


def test_least_recently_used_leaves_first() -> None:
    made: list[str] = []

    def value(key: str) -> str:
        return store.get(key, lambda: made.append(key) or key * 3)  # type: ignore[func-returns-value]

    store: Recent[str, str] = Recent(9, len)
    assert [value(key) for key in "abcab"] == ["aaa", "bbb", "ccc", "aaa", "bbb"]
    assert made == ["a", "b", "c"]
    value("d")
    assert value("a") == "aaa"
    assert made == ["a", "b", "c", "d"]
    value("c")
    assert made == ["a", "b", "c", "d", "c"]


def test_those_missing_are_made_together_each_once() -> None:
    asked: list[list[str]] = []

    def make(keys: list[str]) -> list[str]:
        asked.append(keys)
        return [key * 2 for key in keys]

    store: Recent[str, str] = Recent(6, len)
    assert store.get_all("aba", make) == ["aa", "bb", "aa"]
    assert store.get_all("bcbd", make) == ["bb", "cc", "bb", "dd"]
    assert store.get_all("dcb", make) == ["dd", "cc", "bb"]
    assert asked == [["a", "b"], ["c", "d"]]
    assert store.get_all("wxyz", make) == ["ww", "xx", "yy", "zz"]
    assert store.get_all("w", make) == ["ww"]
    assert asked[2:] == [["w", "x", "y", "z"], ["w"]]


def test_what_is_over_the_budget_is_made_and_not_kept() -> None:
    store: Recent[str, bytes] = Recent(4, len)
    assert store.get("small", lambda: b"12") == b"12"
    assert store.get("large", lambda: b"12345") == b"12345"
    calls = []
    store.get("large", lambda: calls.append(1) or b"12345")  # type: ignore[func-returns-value]
    assert calls


def test_what_is_forgotten_makes_room_and_does_not_wait_for_what_is_being_made() -> None:
    store: Recent[str, bytes] = Recent(4, len)
    store.get("old", lambda: b"12")
    begun, forgotten = threading.Event(), threading.Event()

    def slow() -> bytes:
        begun.set()
        assert forgotten.wait(60)
        return b"34"

    making = threading.Thread(target=store.get, args=("new", slow))
    making.start()
    assert begun.wait(60)
    store.forget(lambda key: key == "old")
    forgotten.set()
    making.join()
    assert store.get("more", lambda: b"56") == b"56"
    assert store.get("new", lambda: b"other") == b"34"
    assert store.get("old", lambda: b"made again") == b"made again"
