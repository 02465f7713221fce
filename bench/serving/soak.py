"""``stylemuse bench soak``: a server under mixed load for minutes; nothing lost, duplicated or hung, memory flat.

Clients send one request after another to ``stylemuse serve`` in a process of its own: the base and every style, one in
five given up when its answer has begun, one in twenty malformed. Every second a style is uploaded, drawn with, and the
one before it unloaded. At the end the server's own counts must agree with the clients'.
"""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylemuse.adapters.formats import pack
from stylemuse.backend.machine import DTYPES

from ..harness import measure
from ..harness.arguments import Arguments, count
from ..harness.networks import pipeline, random_adapter
from . import client

CANCELLED, MALFORMED = 0.20, 0.05
MALFORMED_BODIES = (
    b"", b"{", b"[]", b'{"prompt": ""}', b'{"prompt": "a fox", "n": 0}', b'{"prompt": "a fox", "n": 1e9}', b"\xff\xfe",
    b'{"prompt": "a fox", "style": "../../secret"}', b'{"prompt": "\\ud800"}', b'{"prompt": "a fox", "colour": 1}',
)  # fmt: skip
HUNG = 120.0
"""Seconds after which a request that is not answered counts as hung."""
WARM = 0.2
"""The share of the time in which clients come one by one, so that every size of a forward pass has been; latency and
memory count after it."""


class Soak:
    """One run's clients, their counts, and the samples of the server's memory."""

    def __init__(self, server: client.Process, styles: Sequence[str], decoding: int, seed: int) -> None:
        self.server, self.styles, self.decoding, self.seed = server, list(styles), decoding, seed
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.latencies: list[float] = []
        self.memory: list[tuple[float, int]] = []
        self.loaded = self.unloaded = self.lost = self.hung = self.duplicated = 0
        self._ended, self._lock = threading.Event(), threading.Lock()

    def run(self, seconds: float, clients: int, uploads: Sequence[bytes]) -> None:
        """Everything at once for so long; returns when every request has ended."""
        gap, warm = WARM * seconds / clients, time.perf_counter() + WARM * seconds
        threads = [threading.Thread(target=self._client, args=(index, index * gap, warm)) for index in range(clients)]
        threads += [threading.Thread(target=self._swap, args=(uploads,)), threading.Thread(target=self._watch)]
        for thread in threads:
            thread.start()
        self._ended.wait(seconds)
        self._ended.set()
        for thread in threads:
            thread.join()

    def _client(self, index: int, wait: float, warm: float) -> None:
        choice, number = random.Random(f"{self.seed} {index}"), 0
        self._ended.wait(wait)
        while not self._ended.is_set():
            seed, number = index * 10**9 + number, number + 1
            draw = choice.random()
            kind = "malformed" if draw < MALFORMED else "cancelled" if draw < MALFORMED + CANCELLED else "drawn"
            body = choice.choice(MALFORMED_BODIES) if kind == "malformed" else self._body(choice, seed, kind)
            began = time.perf_counter()
            try:
                answer = client.send(
                    self.server.url, "POST", client.GENERATIONS, body, timeout=HUNG, leave=kind == "cancelled"
                )
                if answer.status == 400 and b"adapter 'soak-" in answer.body and b"is unknown" in answer.body:
                    kind = "gone"  # its style was unloaded meanwhile
                problem = self._judge(kind, answer, seed)
            except TimeoutError:
                self.hung, problem = self.hung + 1, f"{kind}: no answer within {HUNG:g} s"
            except OSError as error:
                self.lost, problem = self.lost + 1, f"{kind}: no answer: {error!r}"
            with self._lock:
                self.outcomes[kind] += 1
                if kind == "drawn" and began >= warm:
                    self.latencies.append(time.perf_counter() - began)
                if problem:
                    self.problems.append(problem)

    def _body(self, choice: random.Random, seed: int, kind: str) -> bytes:
        facts: dict[str, Any] = {"prompt": choice.choice(("a fox", "a castle", "a car")), "seed": seed}
        facts["num_inference_steps"] = self.decoding
        if style := choice.choice([None, *self.styles, *([f"soak-{self.loaded - 1}"] if self.loaded else [])]):
            facts["style"] = style
        if kind == "cancelled":
            facts |= {"stream": True, "partial_images": 3}
        return json.dumps(facts).encode()

    def _judge(self, kind: str, answer: client.Answer, seed: int) -> str | None:
        """What is wrong with an answer, if anything is."""
        if kind == "malformed":
            return None if 400 <= answer.status < 500 else f"malformed: answered {answer.status}"
        if kind == "gone":
            return None
        if answer.status != 200:
            return f"{kind}: answered {answer.status} {answer.body[:200]!r}"
        if kind == "drawn":
            seeds = [picture["seed"] for picture in answer.document["data"]]
            if seeds != [seed]:
                self.duplicated += len(seeds) > 1
                return f"drawn: pictures of seeds {seeds} for {seed}"
        return None

    def _swap(self, uploads: Sequence[bytes]) -> None:
        """A style comes and one goes, every second."""
        while not self._ended.wait(1.0):
            data = uploads[self.loaded % len(uploads)]
            self.loaded += self._administer("PUT", f"/v1/adapters/soak-{self.loaded}", data)
            if self.loaded - self.unloaded > 1:
                body = json.dumps({"lora_name": f"soak-{self.unloaded}"}).encode()
                self.unloaded += self._administer("POST", "/v1/unload_lora_adapter", body)

    def _administer(self, method: str, path: str, body: bytes) -> bool:
        """Whether it was done."""
        try:
            answer = client.send(self.server.admin, method, path, body, token=self.server.token, timeout=HUNG)
            problem = None if answer.status == 200 else f"answered {answer.status} {answer.body[:200]!r}"
        except OSError as error:
            problem = f"no answer: {error!r}"
        if problem is not None:
            with self._lock:
                self.problems.append(f"administration: {path}: {problem}")
        return problem is None

    def _watch(self) -> None:
        began, page, facts = time.perf_counter(), os.sysconf("SC_PAGE_SIZE"), Path(f"/proc/{self.server.pid}/statm")
        while facts.exists() and not self._ended.wait(1.0):
            pages = facts.read_text(encoding="ascii").split()[1]
            self.memory.append((time.perf_counter() - began, int(pages) * page))

    def report(self, seconds: float) -> dict[str, Any]:
        """The row of the document, the server's counts compared."""
        sent = self.outcomes["drawn"] + self.outcomes["cancelled"]
        counts = self._counts(sent)
        ended = sum(counts["ended"].values())
        if ended != sent or counts["accepted"]:
            self.problems.append(f"{sent} requests were sent, {ended} ended, {counts['accepted']:g} are still in")
        row = {
            "name": f"soak, {seconds / 60:g} minutes",
            "scenario": "soak",
            "run_seconds": seconds,
            "requests": sum(self.outcomes.values()),
            "rate": sum(self.outcomes.values()) / seconds,
            "outcomes": dict(self.outcomes),
            "server": counts["ended"],
            "adapters": {"loaded": self.loaded, "unloaded": self.unloaded},
            "lost": self.lost + max(0, sent - ended),
            "duplicated": self.duplicated + max(0, ended - sent),
            "hung": self.hung + int(counts["accepted"]),
            "problem_count": len(self.problems),
            "problems": self.problems[:100],
            "memory": memory(self.memory),
            "memory_bytes": [size for _, size in self.memory],
        }
        if not self.latencies:
            return row | {"skipped": "no request was answered"}
        p95, p99 = (float(value) for value in np.percentile(self.latencies, (95, 99)))
        return row | {"latency": measure.series(self.latencies), "latency_tail": {"p95": p95, "p99": p99}}

    def _counts(self, sent: int) -> dict[str, Any]:
        """What the server says, once it has nothing left to do; a client that left is not there to see its end."""
        for _ in range(100):
            text = client.send(self.server.url, "GET", "/metrics").body.decode()
            accepted = float(re.findall(r"^stylemuse_requests_accepted (\S+)$", text, re.MULTILINE)[0])
            found = re.findall(r'^stylemuse_request_seconds_count\{outcome="(\w+)"\} (\S+)$', text, re.MULTILINE)
            ended = {outcome: int(float(value)) for outcome, value in found}
            if not accepted and sum(ended.values()) >= sent:
                break
            time.sleep(0.1)
        return {"accepted": accepted, "ended": ended}


def memory(samples: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Of (seconds, bytes) after the warm-up: the first and the last tenth's median, the most, and the straight line.

    ``grown`` is last to first, ``slope`` the line's growth over that time, both as shares of the first.
    """
    last = samples[-1][0] if samples else 0.0
    kept = [(at, size) for at, size in samples if at >= WARM * last]
    if len(kept) < 8:
        return {"grown": None}
    at, sizes = np.array([at for at, _ in kept]), np.array([float(size) for _, size in kept])
    span = (at[-1] - at[0]) / 10
    first, end = float(np.median(sizes[at <= at[0] + span])), float(np.median(sizes[at >= at[-1] - span]))
    slope = float(np.polynomial.Polynomial.fit(at, sizes, 1).convert().coef[1]) * (at[-1] - at[0]) / first
    facts = {"bytes_first": first, "bytes_last": end, "bytes_most": float(sizes.max())}
    return facts | {"grown": end / first - 1.0, "slope": float(slope)}


def show(row: Mapping[str, Any]) -> None:
    """What was found, a line each."""
    for name in ("requests", "rate", "outcomes", "server", "adapters", "lost", "duplicated", "hung", "problem_count"):
        print(f"{name:14} {row[name]}")
    if "latency" in row:
        times = {"p50": row["latency"]["p50"], **row["latency_tail"]}
        print("latency        " + ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in times.items()))
    print("memory         " + ", ".join(f"{name} {value}" for name, value in row["memory"].items()))
    for problem in row["problems"][:10]:
        print(f"problem        {problem}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print what was found, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=count, default=8)
    parser.add_argument("--max-rows", type=count, default=16, help="fewer than the clients' requests have: some wait")
    parser.add_argument("--steps", type=count, default=12)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.common(device=False)
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error("--minutes is above 0")
    pipe = pipeline("demo", dtype="float32")
    uploads = [pack(random_adapter(pipe, "soak", rank=4, seed=seed), "diffusers") for seed in range(5)]
    chosen = ["--model", options.model, "--max-rows", str(options.max_rows)]
    chosen += ["--dtype", options.dtype] if options.dtype else []
    with (
        tempfile.TemporaryDirectory(prefix="stylemuse-soak-") as state,
        client.server([*chosen, "--state", state]) as at,
    ):
        models = client.send(at.url, "GET", "/v1/models").document["data"]
        soak = Soak(at, [model["id"] for model in models if model["parent"]], options.steps, options.seed)
        soak.run(options.minutes * 60, options.clients, [next(iter(files.values())) for files in uploads])
        row = soak.report(options.minutes * 60)
    show(row)
    made = measure.document(parser.command, options.seed, torch.device("cpu"), {}, serve=[row])
    measure.publish(made, options.out)
