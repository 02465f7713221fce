"""Prometheus metrics of one server, in a registry of its own; every label has a bounded set of values."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ..engine.engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"})


class Metrics:
    """Counts what the engine and the boundary tell."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._answers = Counter(
            "stylemuse_http_requests", "Answers", ("method", "route", "status"), registry=self.registry
        )
        self._latency = Histogram(
            "stylemuse_http_seconds", "Until the answer ended", ("route",), buckets=_SECONDS, registry=self.registry
        )
        self._requests = Histogram(
            "stylemuse_request_seconds",
            "From accepted to ended",
            ("outcome",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._step = Histogram("stylemuse_step_seconds", "One decoding step", buckets=_SECONDS, registry=self.registry)
        self._rows = Histogram("stylemuse_step_rows", "Rows of a step", buckets=_ROWS, registry=self.registry)
        self._pictures = Counter("stylemuse_picture_steps", "Pictures times steps", registry=self.registry)

    def watch(self, engine: Engine) -> None:
        """Ask the engine for its state whenever the metrics are read."""
        self.registry.register(_State(engine))

    def on_step(self, seconds: float, rows: float, pictures: int) -> None:
        """A step was done."""
        self._step.observe(seconds)
        self._rows.observe(rows)
        self._pictures.inc(pictures)

    def on_end(self, outcome: str, seconds: float) -> None:
        """A request ended."""
        self._requests.labels(outcome).observe(seconds)

    def on_answer(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request was answered."""
        self._answers.labels(method if method in METHODS else "other", route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)


class _State(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The engine's state as gauges."""
        stats, library = self._engine.stats(), self._engine.pipe.adapters
        gauges = {
            "stylemuse_requests_accepted": ("Requests in the engine", stats.accepted),
            "stylemuse_requests_waiting": ("Of them not prepared yet", stats.waiting),
            "stylemuse_pictures_running": ("Pictures in the forward passes", stats.pictures),
            "stylemuse_adapters_registered": ("Styles by name", len(library)),
            "stylemuse_adapters_resident": ("Of them in a slot", len(library.resident)),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(name, what, value)
