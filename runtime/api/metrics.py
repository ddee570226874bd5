"""`/metrics` in Prometheus' text format.

Telemetry counts the frequent events; everything else is read from the rows and from the components at each scrape.
Hazard: the route is a plain function on purpose, so that FastAPI runs it in a thread: it reads the database.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from memory.schema import Policy, PolicyStage
from memory.storage.histogram import BOUNDS, Histogram
from runtime.api.services import Server, Services
from runtime.observability.telemetry import STATE_METRICS

router = APIRouter(tags=["health"])

SHOWN_STAGES = (PolicyStage.ACTIVE, PolicyStage.CANARY, PolicyStage.CANDIDATE)

LabelledValues = Iterable[tuple[tuple[str, ...], float]]
"""(label values in the order of the metric's labels, value)"""


@router.get("/metrics", summary="Read all metrics, for Prometheus", response_class=Response)
def metrics(server: Server) -> Response:
    """Prometheus' text format. `docs/grafana.json` is a dashboard for it."""
    registry = CollectorRegistry()
    registry.register(StateCollector(server))
    # No name may be in both: Prometheus rejects a scrape that declares a metric twice.
    text = generate_latest(server.agent.telemetry.registry) + generate_latest(registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


class StateCollector(Collector):
    """Collects the metrics of `telemetry.STATE_METRICS` once for each scrape."""

    def __init__(self, server: Services) -> None:
        self._server = server

    def describe(self) -> list[Metric]:
        return []  # otherwise `register` would call `collect` for the names

    def collect(self) -> Iterator[Metric]:
        yield from self._collect_memory()
        yield from self._collect_policies()
        yield from self._collect_cycles()

    def _collect_memory(self) -> Iterator[Metric]:
        memory = self._server.memory
        closed = memory.trajectories.num_closed  # `list`: the event loop adds keys while this thread iterates
        yield counter("trajectories", (((outcome, split.value), n) for (outcome, split), n in list(closed.items())))
        yield counter("feedback", (((kind,), n) for kind, n in list(memory.feedback.num_posted.items())))
        yield gauge("queue", [((), memory.database.num_queued)])
        yield histogram("acknowledgement", {(): memory.database.acknowledgements})
        yield histogram("retrieval", {(stage,): seconds for stage, seconds in memory.retrieval.seconds.items()})
        yield counter("by_word_alone", [((), memory.index.num_without_vectors)])

    def _collect_policies(self) -> Iterator[Metric]:
        server = self._server
        engine, hotswap = server.engine, server.hotswap
        shown = [
            policy
            for policy in server.memory.policies.select()
            if policy.stage in SHOWN_STAGES or policy.version in hotswap.loaded_versions
        ]
        yield gauge("policy", ((_policy_labels(policy, hotswap.active_version), 1) for policy in shown))
        yield gauge("loaded", [((), len(hotswap.loaded_versions))])
        yield counter("swaps", [((), hotswap.num_swaps)])
        yield gauge("engine_ready", [((), float(engine.is_ready))])
        yield counter("engine_restarts", [((), engine.num_restarts)])
        maintenance = server.maintenance
        yield gauge("maintenance", [((), float(maintenance is not None and maintenance.reason is not None))])

    def _collect_cycles(self) -> Iterator[Metric]:
        cycles = self._server.memory.cycles
        ended = cycles.outcomes()
        verdicts = [verdict for _, verdict in ended if verdict and "decision" in verdict]
        counted = {(verdict.get("policy"), verdict["decision"]) for verdict in verdicts}
        # A policy may be decided after its cycle has ended; such a verdict is on the policy's row alone.
        verdicts += [
            policy.verdict
            for policy in self._server.memory.policies.select()
            if policy.verdict and (policy.version, policy.verdict["decision"]) not in counted
        ]
        decisions = Counter(verdict["decision"] for verdict in verdicts)
        yield counter("decisions", (((decision,), n) for decision, n in decisions.items()))
        outcomes = Counter(stage for stage, _ in ended)
        yield counter("cycles", (((stage,), n) for stage, n in outcomes.items()))
        running = cycles.unfinished()
        current = None if running is None else running.stage
        # also those that are over: a series that ended with a 1 would go on being read as the current one
        stages = {*list(cycles.stage_seconds), *([] if current is None else [current])}
        yield gauge("cycle_stage", (((stage,), float(stage == current)) for stage in sorted(stages)))
        progress = {} if running is None else running.progress
        yield gauge("cycle_progress", [((), progress.get("done", 0) / max(1, progress.get("total", 0)))])
        yield counter("stage_seconds", (((stage,), n) for stage, n in list(cycles.stage_seconds.items())))


def counter(key: str, values: LabelledValues) -> Metric:
    """Return a counter; `key` is one of `STATE_METRICS`."""
    name, documentation, labels = STATE_METRICS[key]
    return _with_values(CounterMetricFamily(name, documentation, labels=labels), values)


def gauge(key: str, values: LabelledValues) -> Metric:
    """Return a gauge; `key` is one of `STATE_METRICS`."""
    name, documentation, labels = STATE_METRICS[key]
    return _with_values(GaugeMetricFamily(name, documentation, labels=labels), values)


def histogram(key: str, histograms: dict[tuple[str, ...], Histogram]) -> Metric:
    """Return a histogram of seconds; `key` is one of `STATE_METRICS`."""
    name, documentation, labels = STATE_METRICS[key]
    family = HistogramMetricFamily(name, documentation, labels=labels)
    for values, measured in histograms.items():
        # Prometheus' buckets are cumulative, ours are not.
        cumulative = itertools.accumulate(list(measured.counts))
        # Read without a lock while another thread counts: the sum may be a moment newer than the buckets.
        buckets = list(zip((*map(str, BOUNDS), "+Inf"), cumulative, strict=True))
        family.add_metric(values, buckets, measured.total_seconds)
    return family


def _policy_labels(policy: Policy, served: int | None) -> tuple[str, ...]:
    adapter = Path(policy.adapter_path).name if policy.adapter_path else ""
    return policy.name, policy.stage.value, policy.base_model, adapter, str(policy.version == served).lower()


def _with_values(family: CounterMetricFamily | GaugeMetricFamily, values: LabelledValues) -> Metric:
    for labels, value in values:
        family.add_metric(labels, value)
    return family
