"""A small client of the server's, on the standard library, and the server as a process."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from stylemuse import StylemuseError

GENERATIONS = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    """Status and body of an answer."""

    status: int
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)


def send(
    url: str,
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    token: str | None = None,
    timeout: float = 60.0,
    leave: bool = False,
) -> Answer:
    """One request on a connection of its own. With ``leave`` the client goes away when a good answer has begun.

    Raises:
        OSError: no answer, or not within ``timeout``.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        headers = dict(JSON) if body is not None else {}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return Answer(answer.status, answer.read(1 if leave and answer.status == 200 else None))
    except http.client.HTTPException as error:
        raise ConnectionError(repr(error)) from error
    finally:
        connection.close()


@dataclass(frozen=True)
class Process:
    """A running ``stylemuse serve``."""

    url: str
    admin: str
    token: str
    pid: int


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[Process]:
    """``stylemuse serve`` with an administration, on free ports; drained at the end, which must succeed."""
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "stylemuse", "serve", "--port", "0", "--admin-port", "0", "--json", *arguments]
    environment = {**os.environ, "STYLEMUSE_ADMIN_TOKEN": token}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as running:
        try:
            facts = _first_document(running)
            yield Process(facts["url"], facts["admin"], token, running.pid)
            running.terminate()
            if running.wait(120) != 0:
                raise StylemuseError(f"the server ended with exit code {running.returncode}")
        finally:
            running.kill()


def _first_document(running: subprocess.Popen[str]) -> Any:
    assert running.stdout is not None
    text = ""
    while line := running.stdout.readline():
        text += line
        try:
            return json.loads(text)
        except ValueError:
            continue
    raise StylemuseError("the server did not start; stylemuse serve tells why")
