"""Styles added to a running server: from a folder, uploaded, replaced, removed; durable, and nobody else's business."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from drawing import draw
from live_server import SOON, serving
from models import random_style

from stylemuse import Adapter, StylemuseError
from stylemuse.adapters import canonical
from stylemuse.adapters.formats import pack
from stylemuse.serving.store import Store


def test_administration(tiny_model: Path, tmp_path: Path) -> None:
    folder, state = tmp_path / "adapters", tmp_path / "state"
    with serving(tiny_model, {"adapters": folder, "state": state}) as live:
        config = live.pipe.network.transformer.config
        looks = [random_style(config, "look", seed=seed) for seed in (5, 6)]
        canonical.save(looks[0], folder / "look")
        canonical.save(looks[0], tmp_path / "outside")
        (folder / "link").symlink_to(tmp_path / "outside")
        (data,) = pack(looks[1], "diffusers").values()
        with httpx2.Client(base_url=live.admin, timeout=SOON) as http:
            assert http.post("/v1/load_lora_adapter", json={}).status_code == 401
        with live.client() as http:
            assert http.post("/v1/load_lora_adapter", json={}).status_code == 404
        with live.administrator() as http:
            for path in ("../outside", str(tmp_path / "outside"), "link", ".", "nothing", "a\0b"):
                wrong = http.post("/v1/load_lora_adapter", json={"lora_name": "look", "lora_path": path})
                assert wrong.status_code == 400, path
                assert str(tmp_path) not in wrong.text
            loaded = http.post("/v1/load_lora_adapter", json={"lora_name": "look", "lora_path": "look"})
            assert loaded.json() == {"id": "look", "root": f"look@{looks[0].sha256[:12]}", "rank": 2}
            first = draw(live.pipe, style="look")
            again = http.post("/v1/load_lora_adapter", json={"lora_name": "look", "lora_path": "look"})
            assert (again.status_code, "exists already" in again.text) == (400, True)
            assert http.put("/v1/adapters/ink", content=data, params={"swap": True}).status_code == 400
            assert http.put("/v1/adapters/bad", content=b"no file").status_code == 400
            uploaded = http.put("/v1/adapters/look", content=data, params={"swap": True, "descriptor": "in look style"})
            assert uploaded.status_code == 200, uploaded.text
            second = draw(live.pipe, style="look")
            assert http.post("/v1/unload_lora_adapter", json={"lora_name": "ink"}).status_code == 400
            assert http.put("/v1/adapters/other", content=data).status_code == 200
            assert http.post("/v1/unload_lora_adapter", json={"lora_name": "other"}).status_code == 200
        assert not np.array_equal(first, second)
        assert live.pipe.adapters.names == ("ink", "look", "neon")
    assert len(list((state / "versions").iterdir())) == 1, "what nobody needs is gone"
    with serving(tiny_model, {"state": state}) as live:
        assert live.pipe.adapters.names == ("ink", "look", "neon")
        assert np.array_equal(draw(live.pipe, style="look"), second)


def small(name: str, number: int) -> Adapter:
    return Adapter(name, "lora", {"site": (torch.full((1, 4), float(number)), torch.ones(4, 1))})


def held(store: Store) -> dict[str, str]:
    """What the store has, read from its files: hash by name."""
    return {name: canonical.load(path).sha256 for name, path in store.adapters.items()}


def test_a_store_comes_back_and_cleans_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = store.put(small("a", 1))
    new = store.put(small("a", 2))
    store.put(small("b", 3))
    store.remove("b")
    store.discard(new)
    (tmp_path / ".registry-1").write_text("half")
    again = Store(tmp_path)
    assert held(again) == {"a": small("a", 2).sha256}
    assert not old.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["registry.json", "versions"]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2, "adapters": {}}', '{"schema": 1, "adapters": {"a": "a@1"}}',
                                  '{"schema": 1, "adapters": {"../a": "../a@1"}}'])  # fmt: skip
def test_a_damaged_registry_is_refused(tmp_path: Path, text: str) -> None:
    Store(tmp_path)
    (tmp_path / "registry.json").write_text(text)
    with pytest.raises(StylemuseError, match=r"^registry\.json"):
        Store(tmp_path)


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing_acknowledged(tmp_path: Path) -> None:
    """A child registers and removes, says what was done, and is killed at a random moment of it."""
    choice, known = random.Random(0), dict[str, str]()
    adapters = [small(f"s{index % 5}", index) for index in range(20)]
    hashes = [adapter.sha256 for adapter in adapters]
    cut_short = 0
    for _ in range(200):
        read, write = os.pipe()
        child, seed = os.fork(), choice.getrandbits(30)
        if child == 0:
            try:
                store, order = Store(tmp_path), random.Random(seed)
                while True:
                    index = order.randrange(20)
                    name = adapters[index].name
                    removes = name in store.adapters and order.random() < 0.3
                    os.write(write, bytes([index, 1 if removes else 0, 0]))
                    store.remove(name) if removes else store.put(adapters[index])
                    os.write(write, bytes([index, 1 if removes else 0, 1]))
            finally:
                os._exit(1)
        os.close(write)
        time.sleep(choice.uniform(0.0, 0.03))  # the random moment; nothing depends on how long it is
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
        begun: dict[str, str] = {}
        for at in range(0, len(said) - 2, 3):
            index, removed, done = said[at : at + 3]
            name = adapters[index].name
            begun = dict(known)
            begun.pop(name, None) if removed else begun.update({name: hashes[index]})
            if done:
                known = begun
        cut_short += begun != known
        found = held(Store(tmp_path))
        assert found in (known, begun), "what was begun may have been done; anything else may not"
        known = found
    assert cut_short > 10, "some were killed in the middle"
