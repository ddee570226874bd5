"""All metrics by name, and the context managers with which the agent and the API measure.

Metrics in `STATE_METRICS` are only named here; `runtime/api/metrics.py` reads their values from memory at each scrape.

    overhead = duration of a request - time it waited for the model and for tools

Invariants: nothing here does I/O or waits; the values of every label are bounded, whatever clients send.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from runtime.engine.client import Completion, Message
from runtime.observability.tracing import Tracing
from runtime.tools.base import ToolResult

REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
OVERHEAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
UNKNOWN = "unknown"
"""The label for names that a client or a model made up."""


class StateMetric(NamedTuple):
    """A metric whose value another component already counts."""

    name: str
    documentation: str
    labels: tuple[str, ...] = ()


STATE_METRICS = {
    "trajectories": StateMetric("ratchet_trajectories", "Trajectories that closed, by how.", ("outcome", "split")),
    "feedback": StateMetric("ratchet_feedback", "Pieces of feedback, by kind; one may be of several.", ("kind",)),
    "queue": StateMetric("ratchet_log_queue_length", "Writes that wait for the disk."),
    "acknowledgement": StateMetric(
        "ratchet_log_acknowledgement_seconds", "From a write's queueing to its being durable."
    ),
    "retrieval": StateMetric(
        "ratchet_retrieval_seconds", "Finding memories, by stage; `all` is one question.", ("stage",)
    ),
    # Names and labels are what docs/grafana.json reads, old words among them.
    "by_word_alone": StateMetric(
        "ratchet_retrieval_without_meanings", "Questions that the vector index did not answer."
    ),
    "policy": StateMetric(
        "ratchet_policy_info",
        "1 for each policy that acts, may act soon, or is loaded.",
        ("policy", "stage", "base_model", "adapter", "worn"),
    ),
    "loaded": StateMetric("ratchet_policies_loaded", "Policies that the engine serves now."),
    "swaps": StateMetric("ratchet_swaps", "Number of activations of another policy."),
    "engine_ready": StateMetric("ratchet_engine_ready", "1 while the engine answers."),
    "engine_restarts": StateMetric("ratchet_engine_restarts", "How often the engine had to be started again."),
    "maintenance": StateMetric("ratchet_engine_in_maintenance", "1 while the engine is stopped on purpose."),
    "decisions": StateMetric("ratchet_gate_decisions", "Verdicts of the release gate, ever.", ("decision",)),
    "cycles": StateMetric("ratchet_cycles", "Cycles that ended, ever.", ("outcome",)),
    "cycle_stage": StateMetric("ratchet_cycle_stage", "1 at the stage of the cycle under way.", ("stage",)),
    "cycle_progress": StateMetric("ratchet_cycle_progress_ratio", "How far that stage is, from 0 to 1."),
    "stage_seconds": StateMetric("ratchet_cycle_stage_seconds", "Time spent in each stage.", ("stage",)),
}


@dataclass
class TimeSpent:
    """The time that one request has waited for the model and for tools."""

    model_seconds: float = 0.0
    tool_seconds: float = 0.0
    num_calls: int = 0


# A context variable, because calls are measured deep inside of the request; tasks inherit it from the request's task.
_spent: ContextVar[TimeSpent | None] = ContextVar("spent", default=None)


class Telemetry:
    """The metrics of one server, and its spans."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self.tracing = tracing or Tracing()
        # Not the library's global registry, where a second server in one process would register the same names.
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "ratchet_requests", "Requests answered.", ("route", "method", "status"), registry=registry
        )
        self._request_seconds = Histogram(
            "ratchet_request_seconds",
            "From a request to the end of its answer.",
            ("route",),
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self._in_progress = Gauge("ratchet_requests_in_progress", "Requests being answered.", registry=registry)
        self._overhead = Histogram(
            "ratchet_overhead_seconds",
            "What a request took beyond waiting for the model and for tools.",
            buckets=OVERHEAD_BUCKETS,
            registry=registry,
        )
        self._model_seconds = Histogram(
            "ratchet_model_seconds", "One model call.", ("policy",), buckets=REQUEST_BUCKETS, registry=registry
        )
        self._model_failures = Counter(
            "ratchet_model_failures", "Model calls that gave no reply.", ("error",), registry=registry
        )
        self._tool_seconds = Histogram(
            "ratchet_tool_seconds", "One tool call.", ("tool",), buckets=REQUEST_BUCKETS, registry=registry
        )
        self._tool_failures = Counter("ratchet_tool_failures", "Tool calls that failed.", ("tool",), registry=registry)
        self._tokens = Counter("ratchet_tokens", "Tokens of model calls.", ("direction",), registry=registry)
        self._prompt_tokens = self._tokens.labels("prompt")
        self._output_tokens = self._tokens.labels("output")
        self._checks = Counter(
            "ratchet_checks", "Answers that a team's checker was to read.", ("outcome",), registry=registry
        )
        self._shed = Counter(
            "ratchet_shed", "Requests turned away for the load's sake.", ("reason",), registry=registry
        )

    @contextlib.contextmanager
    def request(self, method: str) -> Iterator[Callable[[str, int], None]]:
        """Measure one request; the yielded function takes its route and status and must be called before the end."""
        spent = TimeSpent()
        token = _spent.set(spent)
        self._in_progress.inc()
        result: tuple[str, int] = (UNKNOWN, 500)

        def set_result(route: str, status: int) -> None:
            nonlocal result
            result = (route, status)

        started = time.perf_counter()
        try:
            yield set_result
        finally:
            seconds = time.perf_counter() - started
            _spent.reset(token)
            route, status = result
            self._in_progress.dec()
            self._requests.labels(route, method, str(status)).inc()
            self._request_seconds.labels(route).observe(seconds)
            # Only requests that called the model: others have no waiting time to subtract.
            if spent.num_calls:
                self._overhead.observe(max(0.0, seconds - spent.model_seconds - spent.tool_seconds))

    @contextlib.contextmanager
    def model_call(
        self, policy: str, episode_id: str, messages: Sequence[Message], request: dict[str, Any]
    ) -> Iterator[Callable[[Completion], None]]:
        """Measure one model call; the yielded function takes the reply. `request` holds the sampling parameters."""
        started = time.perf_counter()
        try:
            with self.tracing.chat(episode_id, messages, request) as trace_reply:

                def record_reply(completion: Completion) -> None:
                    self._prompt_tokens.inc(len(completion.prompt_token_ids))
                    self._output_tokens.inc(len(completion.output_token_ids))
                    trace_reply(completion)

                yield record_reply
        # Not BaseException: a client that leaves is no failure of the model.
        except Exception as error:
            self._model_failures.labels(type(error).__name__).inc()
            raise
        finally:
            seconds = time.perf_counter() - started
            self._model_seconds.labels(policy).observe(seconds)
            if (spent := _spent.get()) is not None:
                # Changed in place and never replaced: LangGraph runs nodes in copies of the context, which would keep a
                # new value to themselves.
                spent.model_seconds += seconds
                spent.num_calls += 1

    @contextlib.contextmanager
    def tool_call(self, call: dict[str, Any], *, is_known: bool) -> Iterator[Callable[[ToolResult], None]]:
        """Measure one tool call; the yielded function takes its result."""
        # Unknown names are invented by models and unbounded; they must not become labels.
        name = call["function"]["name"] if is_known else UNKNOWN
        started = time.perf_counter()
        try:
            with self.tracing.execute_tool(call) as trace_result:

                def record_result(result: ToolResult) -> None:
                    if result.error is not None:
                        self._tool_failures.labels(name).inc()
                    trace_result(result)

                yield record_result
        finally:
            seconds = time.perf_counter() - started
            self._tool_seconds.labels(name).observe(seconds)
            if (spent := _spent.get()) is not None:
                spent.tool_seconds += seconds

    def check(self, outcome: str) -> None:
        """Count an answer that a team's checker was to read: accepted, sent_back, unreadable or skipped."""
        self._checks.labels(outcome).inc()

    def shed(self, reason: str) -> None:
        """Count a request that was rejected because of load. `reason` is an error's code: one of few."""
        self._shed.labels(reason).inc()

    def close(self) -> None:
        """Export the remaining spans, for a few seconds at most. Blocks: call it in a thread."""
        self.tracing.close()
