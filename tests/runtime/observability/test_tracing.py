"""Spans: their content, what they leave out, and that no request waits for them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import structlog
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from memory.schema import TrajectoryStage
from memory.store import Memory
from runtime.agent.graph import Agent
from runtime.config import AgentConfig
from runtime.observability.telemetry import Telemetry
from runtime.observability.tracing import Tracing, open_tracing
from runtime.serving.hotswap import HotSwap
from tests.runtime.fake_engine import FakeEngine, Reply, call
from tests.runtime.levers import Levers
from tests.support.rollouts import play


class Traced:
    """An agent whose spans are collected."""

    def __init__(self, memory: Memory, hotswap: HotSwap, levers: Levers, *, with_content: bool = False) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(self.provider.get_tracer("test"), provider=self.provider, with_content=with_content)
        config = AgentConfig(max_steps=6, max_seconds=20.0)
        self.agent = Agent(memory, hotswap, {"levers": levers}, config, telemetry=Telemetry(self.tracing))

    @property
    def spans(self) -> dict[str, list]:
        found: dict[str, list] = {}
        for span in self.exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found


@pytest.fixture
def traced(memory: Memory, hotswap: HotSwap, levers: Levers) -> Iterator[Traced]:
    traced = Traced(memory, hotswap, levers)
    yield traced
    traced.provider.shutdown()


def pulls(*levers: str):
    rest = iter(levers)
    return lambda request: call("pull", lever=next(rest))


async def test_an_episode_is_one_tree_of_genai_spans(traced: Traced, fake: FakeEngine, levers: Levers):
    fake.script = pulls("left", "right", "left")
    trajectory = await play(traced.agent, levers.task("left-right-left"), seed=5)

    (root,) = traced.spans["invoke_agent ratchet"]
    chats, tools = traced.spans[f"chat {fake.requests[0]['model']}"], traced.spans["execute_tool pull"]
    assert (len(chats), len(tools)) == (3, 3)
    assert {span.parent.span_id for span in (*chats, *tools)} == {root.context.span_id}
    assert root.attributes["gen_ai.operation.name"] == "invoke_agent"
    assert root.attributes["gen_ai.response.id"] == trajectory.id
    assert root.attributes["gen_ai.conversation.id"] == trajectory.episode_id
    assert root.attributes["gen_ai.usage.output_tokens"] == trajectory.output_tokens
    assert chats[1].attributes["gen_ai.request.seed"] == 6
    assert chats[0].attributes["gen_ai.response.finish_reasons"] == ("tool_calls",)
    assert chats[0].attributes["gen_ai.usage.input_tokens"] > 0
    assert tools[0].attributes["gen_ai.tool.name"] == "pull"


async def test_nothing_that_was_said_is_in_a_span(traced: Traced, fake: FakeEngine):
    fake.script = lambda request: Reply("a private word")
    await play(traced.agent, messages=[{"role": "user", "content": "a private question"}])
    fake.script = lambda request: Reply(status=500, error="a private trouble")
    await play(traced.agent, messages=[{"role": "user", "content": "a private question"}])
    everything = " ".join(span.to_json() for span in traced.exporter.get_finished_spans())
    assert "chat" in everything and "private" not in everything


async def test_a_failure_is_named_by_its_class(traced: Traced, fake: FakeEngine):
    fake.script = lambda request: Reply(status=422, error="broken")
    trajectory = await play(traced.agent, messages=[{"role": "user", "content": "hi"}])
    assert trajectory.stage is TrajectoryStage.FAILED
    for spans in traced.spans.values():
        assert [span.attributes["error.type"] for span in spans] == ["PolicyError"]
        assert not spans[0].status.is_ok


async def test_content_is_there_when_asked_for(memory: Memory, hotswap: HotSwap, levers: Levers, fake: FakeEngine):
    traced = Traced(memory, hotswap, levers, with_content=True)
    fake.script = pulls("left", "right", "left")
    await play(traced.agent, levers.task("left-right-left"))
    traced.provider.shutdown()
    (last,) = traced.spans[f"chat {fake.requests[0]['model']}"][2:]
    heard = json.loads(last.attributes["gen_ai.input.messages"])
    assert [message["role"] for message in heard] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert heard[3]["parts"][0]["response"] == "Click."
    said = json.loads(last.attributes["gen_ai.output.messages"])
    assert said[0]["parts"][0]["name"] == "pull"
    assert traced.spans["execute_tool pull"][0].attributes["gen_ai.tool.call.result"] == "Click."


async def test_an_exporter_that_hangs_holds_up_nobody(memory: Memory, hotswap: HotSwap, levers: Levers):
    class Hanging(SpanExporter):
        def __init__(self) -> None:
            self.released = threading.Event()
            self.threads: set[int] = set()

        def export(self, spans):
            self.threads.add(threading.get_ident())
            self.released.wait(30)
            return SpanExportResult.SUCCESS

    exporter, provider = Hanging(), TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter, max_export_batch_size=1, schedule_delay_millis=1))
    tracing = Tracing(provider.get_tracer("test"), provider=provider)
    agent = Agent(memory, hotswap, {"levers": levers}, AgentConfig(max_seconds=20.0), telemetry=Telemetry(tracing))
    try:
        for _ in range(5):
            trajectory = await play(agent, messages=[{"role": "user", "content": "hi"}])
            assert trajectory.stage is TrajectoryStage.FINISHED
        deadline = time.monotonic() + 10
        while not exporter.threads and time.monotonic() < deadline:
            time.sleep(0.01)
        assert exporter.threads and threading.get_ident() not in exporter.threads
    finally:
        exporter.released.set()
        tracing.close()


def test_a_callers_trace_goes_on(traced: Traced):
    headers = [(b"traceparent", b"00-" + b"ab" * 16 + b"-" + b"cd" * 8 + b"-01")]
    with traced.tracing.continue_from(headers), traced.tracing.invoke_agent("eps_1", "trj_1", "v0"):
        pass
    (span,) = traced.spans["invoke_agent ratchet"]
    assert f"{span.context.trace_id:032x}" == "ab" * 16


def is_on(environ: dict[str, str]) -> bool:
    tracing = open_tracing(environ)
    try:
        return tracing._tracer is not None
    finally:
        tracing.close()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, True),
    ],
)
def test_the_standard_variables_decide_whether_anything_leaves(environ: dict[str, str], expected: bool):
    assert is_on(environ) is expected


def test_spans_reach_a_collector_from_a_thread_of_their_own(monkeypatch: pytest.MonkeyPatch):
    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    got: list[tuple[str, bytes]] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("NO_PROXY", "*")
        tracing = open_tracing(os.environ)
        with tracing.invoke_agent("eps_1", "trj_1", "v0") as note:
            note(None)
        tracing.close()
        collector.shutdown()
    ((path, body),) = got
    assert path == "/v1/traces" and b"invoke_agent ratchet" in body and b"trj_1" in body


@pytest.mark.parametrize(
    "environ",
    [{"OTEL_TRACES_EXPORTER": "zipkin"}, {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "smoke"}],
)
def test_an_exporter_that_is_not_here_is_refused_by_name(environ: dict[str, str]):
    with pytest.raises(ValueError, match=r"'zipkin'|'smoke'"):
        open_tracing(environ)


async def test_logs_of_an_episode_carry_its_trajectory(agent: Agent, fake: FakeEngine):
    fake.script = lambda request: Reply(status=500, error="broken")
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        trajectory = await play(agent, messages=[{"role": "user", "content": "hi"}])
    (line,) = [line for line in logs if line["event"] == "episode failed"]
    assert (line["trajectory_id"], line["episode_id"]) == (trajectory.id, trajectory.episode_id)
    assert structlog.contextvars.get_contextvars() == {}
