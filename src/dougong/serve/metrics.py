"""What the server counts, for Prometheus.

Here        Metrics.
Elsewhere   what happens (app.py, engine.py); a board that shows it (deploy/grafana.json).
Promise     labels are names of models, versions, modalities, routes and statuses, never anything that a caller wrote:
            nobody can make the page grow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from dougong.serve.engine import BatchDone
    from dougong.serve.models import Models, Version

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SAMPLED: Final = 1
"""Answers of a batch whose gate weights are looked at: reading them costs more than counting."""


class Metrics:
    """All counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        of_version = ("model", "version")
        make: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter("dougong_requests", "Requests by route and status.", ("route", "status"), **make)
        self._latency = Histogram(
            "dougong_request_seconds", "From a request's headers to its answer.", ("route",), buckets=SECONDS, **make
        )
        self._size = Histogram("dougong_batch_records", "Records of a batch.", of_version, buckets=SIZES, **make)
        self._service = Histogram(
            "dougong_batch_seconds", "What a batch took its worker.", of_version, buckets=SECONDS, **make
        )
        self._wait = Histogram(
            "dougong_wait_seconds", "What records waited for their batch.", of_version, buckets=SECONDS, **make
        )
        self._carried = Counter("dougong_modality_records", "Records with it.", (*of_version, "modality"), **make)
        self._failed = Counter("dougong_records_failed", "Records without an answer.", (*of_version, "status"), **make)
        self._refused = Counter("dougong_refused", "Requests not taken.", ("reason",), **make)
        self._gate = Summary("dougong_gate_weight", "How much it counted.", (*of_version, "modality"), **make)
        self._quality = Summary(
            "dougong_input_quality", "How good media are as recordings of anything.", (*of_version, "figure"), **make
        )
        self._shadow = Counter("dougong_shadow", "Answers of a shadow.", (*of_version, "alike"), **make)
        self._started = Gauge("dougong_started_seconds", "When the server started.", **make)
        self._started.set_to_current_time()
        self._children: dict[tuple[Any, ...], Any] = {}

    def watch(self, models: Models) -> None:
        """Show queues as they are whenever somebody looks."""
        self._registry.register(_Queues(models))

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered, in whatever way."""
        self._child(self._requests, route, str(status)).inc()
        self._child(self._latency, route).observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was not taken."""
        self._child(self._refused, reason).inc()

    def shadow(self, version: Version, alike: bool) -> None:
        """A shadow has answered: as the version that was asked did, or otherwise."""
        self._child(self._shadow, version.name, version.version, str(alike).lower()).inc()

    def batch(self, version: Version, done: BatchDone) -> None:
        """A batch came back."""
        of = version.name, version.version
        self._child(self._size, *of).observe(done.size)
        self._child(self._service, *of).observe(done.seconds)
        observe = self._child(self._wait, *of).observe
        for seconds in done.waited_seconds:
            observe(seconds)
        for shape, number in done.shapes.items():
            for modality in shape.carries:
                self._child(self._carried, *of, modality).inc(number)
        for outcome in done.outcomes:
            if outcome.status != 200:
                self._child(self._failed, *of, str(outcome.status)).inc()
        for outcome in done.outcomes[:SAMPLED]:
            if outcome.status == 200:
                for modality, weight in json.loads(outcome.body).get("gate", {}).items():
                    self._child(self._gate, *of, modality).observe(weight)
        for figure, value in done.quality.items():
            self._child(self._quality, *of, figure).observe(value)

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _child(self, family: Any, *labels: str) -> Any:
        key = family, *labels
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = family.labels(*labels)
        return child


class _Queues(Collector):
    """Figures that are read when somebody asks."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        names = ("model", "version")
        waiting = GaugeMetricFamily("dougong_queue_records", "Records that wait.", labels=names)
        running = GaugeMetricFamily("dougong_running_batches", "Batches at workers.", labels=names)
        ready = GaugeMetricFamily("dougong_ready", "Whether a worker is warm.", labels=names)
        wait = GaugeMetricFamily("dougong_rule_wait_seconds", "How long a batch waits to fill.", labels=names)
        fixed = GaugeMetricFamily(
            "dougong_fitted_fixed_seconds", "What a batch takes beyond its records.", labels=names
        )
        for version in self._models.all:
            batcher, of = version.engine.batcher, (version.name, version.version)
            waiting.add_metric(of, len(batcher))
            running.add_metric(of, batcher.num_running)
            ready.add_metric(of, float(version.engine.ready))
            wait.add_metric(of, batcher.hindsight.rule.wait_seconds)
            fixed.add_metric(of, batcher.service.fixed_seconds)
        return [waiting, running, ready, wait, fixed]
