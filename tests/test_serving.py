"""The server over loopback: OpenAI's client, the stream, models, limits, errors, tokens, metrics, leaving, draining."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from gate import Gate, settled
from live_server import SOON, Live, serving
from PIL import Image

from stylemuse import CFG, Style, StyleDrop
from stylemuse.serving.settings import Limits

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def live(tiny_model: Path) -> Iterator[Live]:
    with serving(tiny_model) as made:
        yield made


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none needed", max_retries=0, timeout=SOON)


def opened(data: str | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data)))


def pixels(live: Live, **options: Any) -> list[bytes]:
    """What the pipeline draws, of seed 7."""
    return [image.tobytes() for image in live.pipe.generate("a fox", **{"seed": 7} | options).images]


# OpenAI's own client.


def test_generate(live: Live, client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a fox", model="tiny", n=3, size="auto", extra_body={"seed": 7})
    assert answer.data is not None
    assert [opened(picture.b64_json).tobytes() for picture in answer.data] == pixels(live, n=3)
    assert (answer.output_format, answer.size) == ("png", "32x32")
    assert answer.usage is not None
    assert (answer.usage.output_tokens, answer.usage.input_tokens) == (3 * 64, 4)


def test_a_model_may_be_a_style(live: Live, client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a fox", model="neon", extra_body={"seed": 7})
    assert answer.data is not None
    assert opened(answer.data[0].b64_json).tobytes() == pixels(live, style="neon")[0]


def test_urls_and_formats(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a fox", response_format="url", output_format="webp", extra_body={"seed": 7})
    assert answer.data is not None
    assert answer.data[0].url is not None
    kind, _, data = answer.data[0].url.partition(",")
    assert kind == "data:image/webp;base64"
    assert opened(data).format == "WEBP"
    small, large = (
        client.images.generate(prompt="a fox", output_format="jpeg", output_compression=quality, extra_body={"seed": 7})
        for quality in (10, 95)
    )
    assert small.data is not None
    assert large.data is not None
    assert opened(small.data[0].b64_json).format == "JPEG"
    assert len(small.data[0].b64_json or "") < len(large.data[0].b64_json or "")


def test_stream(live: Live, client: openai.OpenAI) -> None:
    seen: list[bytes] = []
    live.pipe.generate("a fox", seed=7, on_step=lambda preview: seen.append(preview.images(0)[0].tobytes()))
    events = list(client.images.generate(prompt="a fox", stream=True, partial_images=3, extra_body={"seed": 7}))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert [opened(event.b64_json).tobytes() for event in events] == seen
    assert [event.partial_image_index for event in events if event.type.endswith("partial_image")] == [0, 1, 2]
    last: Any = events[-1]
    assert (last.seed, last.usage.output_tokens, last.size) == (7, 64, "32x32")


def test_models(live: Live, client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["tiny", "ink", "neon"]
    parents: list[Any] = [getattr(model, "parent", None) for model in models.values()]
    assert parents == [None, "tiny", "tiny"]
    one: Any = client.models.retrieve("ink")
    assert one.root == f"ink@{live.pipe.adapters['ink'].sha256[:12]}"
    with pytest.raises(openai.NotFoundError, match="there is no such model"):
        client.models.retrieve("nope")


# Our extensions.


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({"style": "ink"}, {"style": "ink"}),
        ({"style": "ink", "adapter_strength": 0.5}, {"style": {"ink": Style(strength=0.5)}}),
        ({"styles": {"ink": 0.5, "neon": {"weight": 0.25, "strength": 2.0}}},
         {"style": {"ink": 0.5, "neon": Style(0.25, 2.0)}}),
        ({"style": "ink", "style_strength": 3, "text_strength": 1.0},
         {"style": "ink", "guidance": StyleDrop(3.0, 1.0)}),
        ({"style": "ink", "style_strength": 3.0}, {"style": "ink", "guidance": StyleDrop(3.0, 2.0)}),
        ({"guidance_scale": 5.0, "negative_prompt": "a cat"}, {"guidance": CFG(5.0), "negative_prompt": "a cat"}),
        ({"num_inference_steps": 7, "size": "16x32"}, {"steps": 7, "size": (16, 32)}),
    ],
)  # fmt: skip
def test_extensions(live: Live, body: dict[str, Any], options: dict[str, Any]) -> None:
    with live.client() as http:
        answer = http.post(PATH, json={"prompt": "a fox", "seed": 7, **body})
    assert answer.status_code == 200, answer.text
    assert opened(answer.json()["data"][0]["b64_json"]).tobytes() == pixels(live, **options)[0]


# Refusals: 4xx, one line, nothing of the server's inside.


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": ""}, "prompt: String should have at least 1 character"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "a" * 2001}, "prompt has over 2000 characters"),
        ({"prompt": "a fox", "colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"prompt": "a fox", "n": 17}, "n = 17 is not allowed: at most 16"),
        ({"prompt": "a fox", "n": 10**30}, "n"),
        ({"prompt": "a fox", "n": "2"}, "n: Input should be a valid integer"),
        ({"prompt": "a fox", "size": "1024x1024"}, "size '1024x1024' is not allowed: auto, 32x32, 16x32"),
        ({"prompt": "a fox", "num_inference_steps": 101}, "num_inference_steps = 101 is not allowed: at most 100"),
        ({"prompt": "a fox", "style": "nope"}, "style 'nope' is unknown; allowed: ink, neon"),
        ({"prompt": "a fox", "model": "../../etc/passwd"}, "style '../../etc/passwd' is unknown"),
        ({"prompt": "a fox", "style": "ink", "styles": {"neon": 1.0}}, "style and styles both choose a style"),
        ({"prompt": "a fox", "styles": {"ink": 0.9, "neon": 0.9}}, "style weights sum to 1.8"),
        ({"prompt": "a fox", "adapter_strength": 2.0}, "adapter_strength needs style"),
        ({"prompt": "a fox", "guidance_scale": 1.0, "negative_prompt": "a cat"}, "the negative prompt has no effect"),
        ({"prompt": "a fox", "guidance_scale": 2.0, "text_strength": 1.0}, "exclude each other"),
        ({"prompt": "a fox", "partial_images": 1}, "partial_images needs stream"),
        ({"prompt": "a fox", "output_compression": 50}, "output_compression is for jpeg and webp"),
        ({"prompt": "a fox", "background": "transparent"}, "background"),
        ({"prompt": "a fox", "timeout": 1e9}, "timeout is at most 300 seconds"),
        ({"prompt": "a fox", "seed": 2**63}, "seed"),
        ({"prompt": "a fox", "seed": -1}, "seed"),
    ],
)  # fmt: skip
def test_refusals(live: Live, body: dict[str, Any], words: str) -> None:
    with live.client() as http:
        answer = http.post(PATH, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert (error["type"], error["request_id"]) == ("invalid_request_error", answer.headers["x-request-id"])


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b'{"\\ud800": 1}',
     b'{"prompt": "a fox", "style": "\\udfff"}', b"[" * 100_000, b'{"prompt": "a fox", "guidance_scale": 1e999}',
     b'{"prompt": "a fox", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "a\\u0000fox", "style": "\\u0000"}'],
)  # fmt: skip
def test_malformed_bodies(live: Live, body: bytes) -> None:
    with live.client() as http:
        answer = http.post(PATH, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_a_query_parameter_without_effect_is_refused(live: Live) -> None:
    with live.client() as http, live.administrator() as administrator:
        answers = [http.post(f"{PATH}?style=ink", json={"prompt": "a fox"}), http.get("/v1/models?style=ink")]
        answers.append(administrator.post("/v1/unload_lora_adapter?style=1", json={"lora_name": "ink"}))
        other = administrator.put("/v1/adapters/look?style=1", content=b"x")
        assert http.get("/livez?x=1").status_code == 200
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "query")
        assert answer.json()["error"]["message"] == "query parameter 'style' is unknown; none is allowed"
    assert (other.status_code, other.json()["error"]["message"]) == (400, "query.style: Extra inputs are not permitted")


def test_no_error_shows_a_path(live: Live) -> None:
    with live.client() as http:
        answers = [http.post(PATH, json={"prompt": "a fox", "style": "x"}), http.get("/v1/nothing"), http.put(PATH)]
    assert [answer.status_code for answer in answers] == [400, 404, 405]
    assert all(live.pipe.name not in answer.text and "Traceback" not in answer.text for answer in answers)


def test_bodies_are_bounded(tiny_model: Path) -> None:
    with (
        serving(tiny_model, {"limits": Limits(body=1000, work=64 * 8, body_seconds=0.2)}) as live,
        live.client() as http,
    ):
        large = http.post(PATH, content=b" " * 1001)
        chunks = http.post(PATH, content=iter([b" " * 600] * 2))
        work = http.post(PATH, json={"prompt": "a fox", "n": 3})
        assert [large.status_code, chunks.status_code, work.status_code] == [413, 413, 400]
        assert "n x steps x tokens is 768; at most 512" in work.text
        with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), SOON) as slow:
            slow.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n".encode())
            assert slow.recv(100).startswith(b"HTTP/1.1 408")


# Tokens, metrics, log, page.


def test_a_token_guards_everything_but_health_and_the_page(tiny_model: Path) -> None:
    with serving(tiny_model, {"token": "a secret token"}) as live:
        with live.client() as http:
            open_paths = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/")
            assert [http.get(path).status_code for path in open_paths] == [200] * 5
            closed = ("/v1/models", "/metrics", "/openapi.json", "/v1/styles/ink/reference.png", "/v1/nothing")
            assert [http.get(path).status_code for path in closed] == [401] * 5
            assert http.post(PATH, json={"prompt": "a fox"}).status_code == 401
            assert http.get("/v1/models", headers={"Authorization": "Bearer a secret tokeN"}).status_code == 401
        with live.client("a secret token") as http:
            assert http.get("/v1/models").status_code == 200


def test_metrics_have_bounded_labels(live: Live) -> None:
    with live.client() as http:
        assert http.post(PATH, json={"prompt": "a fox"}).status_code == 200
        for index in range(5):
            http.get(f"/v1/nothing/{index}")
            http.get(f"/v1/models/{index}")
        text = http.get("/metrics").text
    assert f'stylemuse_http_requests_total{{method="POST",route="{PATH}",status="200"}}' in text
    assert 'stylemuse_request_seconds_count{outcome="done"}' in text
    for name in ("stylemuse_step_seconds_count", "stylemuse_step_rows_bucket", "stylemuse_adapters_resident 2.0"):
        assert name in text
    assert set(re.findall(r'route="([^"]+)"', text)) <= {
        PATH, "/v1/models", "/v1/models/{name}", "/metrics", "other", "/livez", "/",
        "/v1/adapters/{name}", "/v1/unload_lora_adapter",
    }  # fmt: skip


def test_every_request_is_one_record(live: Live) -> None:
    with live.client() as http:
        answer = http.post(PATH, json={"prompt": "a fox", "user": "me"}, headers={"X-Request-Id": "my-id.1"})
        http.get("/livez")  # the record is written when the answer is out
    assert answer.headers["x-request-id"] == "my-id.1"
    (record,) = [record for record in live.records if record["request_id"] == "my-id.1"]
    assert (record["method"], record["path"], record["status"], record["user"]) == ("POST", PATH, 200, "me")
    json.dumps(record)


def test_the_page_needs_nothing_from_elsewhere(live: Live) -> None:
    with live.client() as http:
        page = http.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.findall(r"https?://", page.text)


# Leaving and draining.


def test_a_client_that_leaves_frees_its_rows(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny_model) as live:
        gate, engine = Gate(live.pipe, monkeypatch), live.service.engine
        for body in ({"prompt": "a fox"}, {"prompt": "a fox", "stream": True, "partial_images": 3}):
            text = json.dumps(body).encode()
            with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), SOON) as client:
                head = (
                    f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
                )
                client.sendall(head.encode() + b"\r\n\r\n" + text)
                gate.arrive()
            settled(engine, lambda: not engine._works)
            gate._open.release()
            settled(engine, lambda: not engine._batcher.running)


def test_a_full_server_and_a_late_one(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny_model, max_requests=1) as live, live.client() as http:
        gate = Gate(live.pipe, monkeypatch)
        with http.stream("POST", PATH, json={"prompt": "a fox", "stream": True}) as first:
            gate.arrive()
            full = http.post(PATH, json={"prompt": "a fox"})
            assert (full.status_code, full.headers["retry-after"]) == (429, "1")
            assert full.json()["error"]["type"] == "rate_limit_error"
            assert f'{{method="POST",route="{PATH}",status="429"}} 1.0' in http.get("/metrics").text
            gate.free()
            assert b"image_generation.completed" in first.read()
        late = http.post(PATH, json={"prompt": "a fox", "timeout": 1e-9})
        assert late.status_code == 504
        events = http.post(PATH, json={"prompt": "a fox", "timeout": 1e-9, "stream": True})
        assert events.text.startswith('event: error\ndata: {"error": {"message": "the request was not done in time"')


def test_a_failing_step_is_a_500_without_its_cause(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny_model) as live, live.client() as http:
        gate = Gate(live.pipe, monkeypatch)
        gate.failing = True
        gate.free()
        answer = http.post(PATH, json={"prompt": "a fox"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "a decoding step failed")
        assert http.post(PATH, json={"prompt": "a fox"}).status_code == 200
        assert "a broken kernel" in live.records[0]["failure"]


def test_draining_finishes_and_refuses(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from threading import Thread

    with serving(tiny_model) as live, live.client() as http:
        gate = Gate(live.pipe, monkeypatch)
        with http.stream("POST", PATH, json={"prompt": "a fox", "stream": True}) as first:
            gate.arrive()
            draining = Thread(target=live.service.drain)
            draining.start()
            settled(live.service.engine, lambda: live.service.engine._closing)
            assert http.get("/readyz").status_code == 503
            assert http.get("/livez").status_code == 200
            assert http.post(PATH, json={"prompt": "a fox"}).status_code == 503
            gate.free()
            assert b"image_generation.completed" in first.read()
            draining.join(SOON)
