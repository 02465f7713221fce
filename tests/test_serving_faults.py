"""What a server said wrongly once: errors in another form, torn names, work that was not counted, other models."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Live, serving
from models import random_style
from PIL import Image

import stylemuse as sm
from stylemuse import Adapter, StylemuseError
from stylemuse.export.graphs.deploy import export
from stylemuse.models.tokenizer import ClipTokenizer
from stylemuse.serving.errors import api_error
from stylemuse.serving.run import Service
from stylemuse.serving.settings import Limits, Settings

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = sm.load(str(tiny_model), backend="reference", device="cpu", dtype="float32")
    export(pipe, folder := tmp_path_factory.mktemp("exports") / "bank")
    return folder


@pytest.fixture(scope="module")
def of_graphs(exported: Path) -> Iterator[Live]:
    """A server over an exported folder, which has no administration."""
    with serving(exported, {"admin_token": None}) as live:
        yield live


def test_an_error_nobody_expected_is_an_answer_like_others(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny_model) as live, live.client() as http:

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("/srv/secret")

        monkeypatch.setattr(live.service.engine, "submit", broken)
        answer = http.post(PATH, json={"prompt": "a fox"})
        assert answer.status_code == 500
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert (error["type"], error["message"]) == (
            "server_error",
            "the server failed; the request id finds it in the log",
        )
        assert error["request_id"] == answer.headers["x-request-id"]
        assert "secret" in live.records[-1]["failure"]


@pytest.mark.parametrize(
    ("model", "text", "told"),
    [
        (".", "strength 0.2 is low. Use 1.0", "strength 0.2 is low. Use 1.0"),
        (".", "size 3 x 4 is impossible for .: both sides", "size 3 x 4 is impossible for shop: both sides"),
        ("a", "a fax for a: at least 1", "shop fax for shop: at least 1"),
        ("/srv/models/tiny", "impossible for /srv/models/tiny: no", "impossible for shop: no"),
        ("tiny", "tiny-256 is not tiny", "tiny-256 is not shop"),
    ],
)
def test_the_models_name_is_replaced_as_a_word(model: str, text: str, told: str) -> None:
    assert api_error(StylemuseError(text), model, "shop").message == told


def test_a_styles_steps_count_as_work(tiny_model: Path) -> None:
    """A style that recommends many steps is as much work as a request that asks for them."""
    with serving(tiny_model, {"limits": Limits(work=64 * 20)}) as live, live.client() as http:
        given = random_style(live.pipe.network.transformer.config, "slow", seed=1)
        live.pipe.adapters.add("slow", Adapter("slow", "lora", given.tensors, recommended={"steps": 21}))
        assert http.post(PATH, json={"prompt": "a fox", "num_inference_steps": 20}).status_code == 200
        for body in ({"style": "slow"}, {"styles": {"ink": 0.4, "slow": 0.6}}, {"num_inference_steps": 21}):
            answer = http.post(PATH, json={"prompt": "a fox", **body})
            assert answer.status_code == 400
            assert answer.json()["error"]["message"] == "n x steps x tokens is 1344; at most 1280 are allowed"


def test_an_exported_folder_is_served(of_graphs: Live) -> None:
    """All that clients ask of a server, over graphs."""
    with of_graphs.client() as http:
        drawn = http.post(PATH, json={"prompt": "a fox", "style": "ink", "seed": 7, "n": 2}).json()
        expected = of_graphs.pipe.generate("a fox", style="ink", seed=7, n=2)
        for picture, image in zip(drawn["data"], expected.images, strict=True):
            assert Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))).tobytes() == image.tobytes()
        assert drawn["usage"]["input_tokens"] == 4
        models = {each["id"]: each for each in http.get("/v1/models").json()["data"]}
        assert set(models) == {"tiny", "ink", "neon"}
        assert models["ink"]["root"].startswith("ink@")
        assert models["ink"]["root"] != models["neon"]["root"].replace("neon", "ink")
        assert http.get("/v1/models/neon").json()["parent"] == "tiny"
        assert http.get("/v1/styles/ink/reference.png").status_code == 404
        assert "stylemuse_adapters_resident 2.0" in http.get("/metrics").text
        assert http.get("/v1/models/none").status_code == 404
        with http.stream("POST", PATH, json={"prompt": "a cat", "stream": True, "partial_images": 2}) as events:
            text = events.read().decode()
        assert text.count("image_generation.partial_image") == 4
        assert "image_generation.completed" in text


def test_an_exported_folder_takes_no_styles(exported: Path) -> None:
    told = r"is an exported folder, which can only be drawn with"
    with pytest.raises(StylemuseError, match=told):
        Service(sm.load(str(exported)), Settings(model="tiny", sizes=((32, 32),), admin_token="administrator"))


@pytest.mark.parametrize(("text", "tokens"), [("a fox", 4), ("", 2), ("a fox " * 200, 402)])
def test_prompts_are_counted(tiny_model: Path, text: str, tokens: int) -> None:
    """Also where a prompt is longer than what is read."""
    tokenizer = ClipTokenizer.from_folder(tiny_model / "tokenizer")
    assert tokenizer.count(text) == tokens
    ids = tokenizer.ids([text])[0]
    assert len(ids) - len([each for each in ids if each == ids[-1]]) + 1 == min(tokens, tokenizer.length)
