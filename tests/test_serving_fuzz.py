"""Whatever is sent, the server answers, and never with a 5xx: bodies of its own fields, of any JSON, of any bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import Live, serving

from stylemuse.serving.schema import Generation
from stylemuse.serving.settings import Limits

PATH = "/v1/images/generations"
TEXT = st.one_of(st.text(max_size=12), st.sampled_from(["a fox", "ink", "tiny", "auto", "32x32", "png", "url", "../x"]))
VALUES: Any = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), st.floats(0, 4), TEXT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.dictionaries(st.sampled_from(sorted(Generation.model_fields)), VALUES, max_size=4)
WORKING = st.fixed_dictionaries(
    {"prompt": st.just("a fox")},
    optional={
        "n": st.integers(1, 3),
        "style": st.sampled_from(["ink", "neon", "nope"]),
        "styles": st.dictionaries(st.sampled_from(["ink", "neon"]), st.floats(0, 1), min_size=1),
        "adapter_strength": st.floats(-100, 100),
        "style_strength": st.floats(0, 100),
        "text_strength": st.floats(0, 100),
        "guidance_scale": st.floats(0, 100),
        "negative_prompt": TEXT,
        "stream": st.booleans(),
        "partial_images": st.integers(0, 5),
        "size": st.sampled_from(["auto", "16x32", "64x64"]),
        "output_format": st.sampled_from(["png", "jpeg", "webp"]),
        "output_compression": st.integers(0, 101),
        "priority": st.integers(-5, 5),
        "seed": st.integers(0, 2**64),
    },
)
FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def live(tiny_model: Path) -> Iterator[Live]:
    with serving(tiny_model, {"limits": Limits(pictures=2, steps=3)}) as made:
        yield made


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx2.Client]:
    with live.client() as made:
        yield made


def check(http: httpx2.Client, body: bytes) -> None:
    answer = http.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), (body, answer.text)
    if answer.status_code == 400:
        error = answer.json()["error"]
        assert error["request_id"] == answer.headers["x-request-id"]
        assert "\n" not in error["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert "event: image_generation.completed" in answer.text, (body, answer.text[:500])


@FUZZ
@given(st.one_of(FIELDS, FIELDS.map(lambda fields: {"prompt": "a fox", **fields}), VALUES))
def test_any_json(http: httpx2.Client, value: Any) -> None:
    check(http, json.dumps(value).encode())


@FUZZ
@given(WORKING)
def test_what_nearly_works(http: httpx2.Client, value: Any) -> None:
    check(http, json.dumps(value | {"num_inference_steps": 2}).encode())


@FUZZ
@given(st.binary(max_size=60))
def test_any_bytes(http: httpx2.Client, body: bytes) -> None:
    check(http, body)


@FUZZ
@given(st.text(max_size=30), st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH"]), st.binary(max_size=30))
def test_any_path(live: Live, http: httpx2.Client, path: str, method: str, body: bytes) -> None:
    from urllib.parse import quote

    for prefix in ("/", "/v1/models/", "/v1/styles/"):
        answer = http.request(method, prefix + quote(path, safe="/", errors="replace"), content=body)
        assert answer.status_code < 500, (prefix, path, answer.text)
    with live.administrator() as administrator:
        answer = administrator.request(method, "/v1/adapters/" + quote(path, safe="/", errors="replace"), content=body)
        assert answer.status_code < 500, (path, answer.text)
