"""`/metrics`, as Prometheus reads it.

Refuses to count: the hot instruments are telemetry's, everything else is read, when somebody asks, from the rows and
from the parts that count it. The route is a plain function, so that all of that happens in a thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from memory.records.cycles import FINAL_STAGES
from memory.schema import CycleStage, Policy, PolicyStage
from memory.storage.histogram import BOUNDS, Tally
from runtime.api.services import Server, Services
from runtime.observability.telemetry import STATE

router = APIRouter(tags=["health"])

SHOWN_STAGES = (PolicyStage.ACTIVE, PolicyStage.CANARY, PolicyStage.CANDIDATE)

Samples = Iterable[tuple[tuple[str, ...], float]]


@router.get("/metrics", summary="Everything that is counted, for Prometheus", response_class=Response)
def metrics(server: Server) -> Response:
    """Prometheus' text format. `docs/grafana.json` is a dashboard over it."""
    state = CollectorRegistry()
    state.register(State(server))
    text = generate_latest(server.agent.telemetry.registry) + generate_latest(state)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


class State:
    """Reads what is counted elsewhere, once for each question."""

    def __init__(self, server: Services) -> None:
        self._server = server

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._of_the_log()
        yield from self._of_policies()
        yield from self._of_cycles()

    def _of_the_log(self) -> Iterator[Metric]:
        memory = self._server.memory
        closed = memory.trajectories.num_closed
        yield counter("trajectories", (((outcome, split.value), n) for (outcome, split), n in list(closed.items())))
        yield counter("feedback", (((kind,), n) for kind, n in list(memory.feedback.num_posted.items())))
        yield gauge("queue", [((), memory.database.num_queued)])
        yield histogram("acknowledgement", {(): memory.database.acknowledgements})
        yield histogram("retrieval", {(stage,): tally for stage, tally in memory.retrieval.seconds.items()})
        yield counter("by_word_alone", [((), memory.index.num_without_meanings)])

    def _of_policies(self) -> Iterator[Metric]:
        server = self._server
        engine, hotswap = server.engine, server.hotswap
        shown = [
            policy
            for policy in server.memory.policies.select()
            if policy.stage in SHOWN_STAGES or policy.version in hotswap.loaded_versions
        ]
        yield gauge("policy", ((_describe(policy, hotswap.active_version), 1) for policy in shown))
        yield gauge("loaded", [((), len(hotswap.loaded_versions))])
        yield counter("swaps", [((), hotswap.num_swaps)])
        yield gauge("engine_ready", [((), float(engine.is_ready))])
        yield counter("engine_restarts", [((), engine.num_restarts)])
        maintenance = server.maintenance
        yield gauge("maintenance", [((), float(maintenance is not None and maintenance.reason is not None))])

    def _of_cycles(self) -> Iterator[Metric]:
        cycles = self._server.memory.cycles
        ended = cycles.outcomes()
        verdicts = [verdict for _, verdict in ended if verdict and "decision" in verdict]
        at_once = {(verdict.get("policy"), verdict["decision"]) for verdict in verdicts}
        judged = [
            (policy.version, policy.verdict) for policy in self._server.memory.policies.select() if policy.verdict
        ]
        # judged by the log, after its cycle had ended
        verdicts += [verdict for version, verdict in judged if (version, verdict["decision"]) not in at_once]
        decisions = Counter(verdict["decision"] for verdict in verdicts)
        yield counter("decisions", (((decision,), n) for decision, n in decisions.items()))
        outcomes = Counter(stage for stage, _ in ended)
        yield counter("cycles", (((stage,), n) for stage, n in outcomes.items()))
        open_one = cycles.unfinished()
        at = None if open_one is None else open_one.stage
        stages = dict.fromkeys([stage.value for stage in CycleStage if stage not in FINAL_STAGES])
        stages |= {} if at is None else {at: None}
        yield gauge("cycle_stage", (((stage,), float(stage == at)) for stage in stages))
        progress = {} if open_one is None else open_one.progress
        yield gauge("cycle_progress", [((), progress.get("done", 0) / max(1, progress.get("total", 0)))])
        yield counter("stage_seconds", (((stage,), n) for stage, n in list(cycles.stage_seconds.items())))


def counter(key: str, samples: Samples) -> Metric:
    return _fill(CounterMetricFamily(**_head(key)), samples)


def gauge(key: str, samples: Samples) -> Metric:
    return _fill(GaugeMetricFamily(**_head(key)), samples)


def histogram(key: str, tallies: dict[tuple[str, ...], Tally]) -> Metric:
    family = HistogramMetricFamily(**_head(key))
    for labels, tally in tallies.items():
        counts, sum_so_far = list(tally.counts), 0
        buckets = []
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), counts, strict=True):
            sum_so_far += count
            buckets.append((bound, sum_so_far))
        family.add_metric(labels, buckets, tally.total_seconds)
    return family


def _describe(policy: Policy, worn: int | None) -> tuple[str, ...]:
    adapter = Path(policy.adapter_path).name if policy.adapter_path else ""
    return policy.name, policy.stage.value, policy.base_model, adapter, str(policy.version == worn).lower()


def _head(key: str) -> dict[str, Any]:
    name, explained, labels = STATE[key]
    return {"name": name, "documentation": explained, "labels": labels}


def _fill(family: CounterMetricFamily | GaugeMetricFamily, samples: Samples) -> Metric:
    for labels, value in samples:
        family.add_metric(labels, value)
    return family
