"""``stylemuse serve`` as a process: it says where it is, draws, and finishes what it accepted when told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from command_line import Run, refused

SOON = 60.0


@contextmanager
def process(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The command with its first output, a JSON document; killed at the end if it is still there."""
    command = [sys.executable, "-m", "stylemuse", "serve", "--port", "0", "--json", *map(str, arguments)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **environment}, **pipes) as running:
        try:
            assert running.stdout is not None
            text = ""
            while not text.endswith("}\n") or text.count("{") != text.count("}"):
                line = running.stdout.readline()
                assert line, running.stderr.read() if running.stderr else ""
                text += line
            yield running, json.loads(text)
        finally:
            running.kill()


@pytest.mark.slow
def test_it_draws_and_drains(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--dtype", "float32", "--admin-port", 0, "--state", tmp_path / "state")
    with process(*options, STYLEMUSE_ADMIN_TOKEN="administrator") as (running, facts):
        assert (facts["model"], facts["max_rows"]) == ("tiny", 32)
        client = openai.OpenAI(base_url=f"{facts['url']}/v1", api_key="none", max_retries=0, timeout=SOON)
        assert client.images.generate(prompt="a fox", model="ink").data
        assert httpx2.get(f"{facts['admin']}/livez", timeout=SOON).status_code == 200
        body = {"prompt": "a fox", "num_inference_steps": 100, "n": 4, "stream": True, "partial_images": 50}
        with httpx2.stream("POST", f"{facts['url']}/v1/images/generations", json=body, timeout=SOON) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "event: image_generation.partial_image"
            running.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("event:")]
        assert rest.count("event: image_generation.completed") == 4
        assert running.wait(SOON) == 0
        assert running.stderr is not None
        records = [json.loads(line) for line in running.stderr.read().splitlines()]
        assert [record["status"] for record in records] == [200, 200, 200]


def test_what_is_refused(run: Run, no_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STYLEMUSE_ADMIN_TOKEN", raising=False)
    refused(run("serve", "--admin-port", 0), "--admin-port needs a token in STYLEMUSE_ADMIN_TOKEN")
    refused(run("serve", "--adapters", tmp_path), "--adapters has no effect without --admin-port")
    refused(run("serve", "--size", "64"), "WIDTHxHEIGHT")
    refused(run("serve", "--host", "999.1.1.1", "--port", 0), "cannot listen on 999.1.1.1:0")
    monkeypatch.setenv("STYLEMUSE_ADMIN_TOKEN", "short")
    refused(run("serve", "--admin-port", 0), "the admin token must have at least 8")
    monkeypatch.setenv("STYLEMUSE_ADMIN_TOKEN", "administrator")
    refused(run("serve", "--admin-port", 0, "--adapters", tmp_path / "none"), "is not a folder")
