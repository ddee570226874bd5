"""Spans by OpenTelemetry's GenAI conventions: `invoke_agent`, `chat`, `execute_tool`.

`open_tracing` configures a tracer of its own, not the process's, from the standard OTEL_* variables; a thread of the
SDK exports the queued spans. Without a tracer every span is a no-op.
Invariants: no exporter runs on the event loop. Spans contain no message content unless
OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT is true; of exceptions only the class, because a message may quote
content.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry import context as otel_context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from memory.errors import read_error
from memory.schema import Trajectory, TrajectoryStage
from runtime.engine.client import Completion, Message
from runtime.tools.base import ToolResult

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

PROVIDER = "vllm"
AGENT = "ratchet"
CLOSE_MILLIS = 3_000
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"

Attributes = dict[str, Any]


class Tracing:
    """Creates the spans of one server; without a tracer, none."""

    def __init__(
        self, tracer: Tracer | None = None, *, provider: TracerProvider | None = None, with_content: bool = False
    ) -> None:
        self._tracer = tracer
        self._provider = provider
        self._with_content = with_content
        # No baggage: what a client sends must not travel on to the collector.
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def continue_from(self, headers: Sequence[tuple[bytes, bytes]]) -> Iterator[None]:
        """Make the spans of a request children of the client's span, if its `traceparent` header names one."""
        if self._tracer is None:
            yield
            return
        carrier = {
            name: value.decode("latin-1")
            for key, value in headers
            if (name := key.decode("latin-1")) in ("traceparent", "tracestate")
        }
        if not carrier:
            yield
            return
        # Detached in the same context, or OpenTelemetry logs an error.
        token = otel_context.attach(self._propagator.extract(carrier))
        try:
            yield
        finally:
            otel_context.detach(token)

    @contextlib.contextmanager
    def invoke_agent(
        self, episode_id: str, trajectory_id: str, policy: str
    ) -> Iterator[Callable[[Trajectory | None], None]]:
        """Span one turn; the yielded function takes its trajectory, or None if it has none."""
        attributes = {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.agent.name": AGENT,
            "gen_ai.agent.version": policy,
            "gen_ai.conversation.id": episode_id,
            "gen_ai.response.id": trajectory_id,
        }
        with self._span(f"invoke_agent {AGENT}", SpanKind.INTERNAL, attributes) as span:

            def note(trajectory: Trajectory | None) -> None:
                if span is not None and trajectory is not None:
                    _note_trajectory(span, trajectory)

            yield note

    @contextlib.contextmanager
    def chat(
        self, episode_id: str, messages: Sequence[Message], request: Mapping[str, Any]
    ) -> Iterator[Callable[[Completion], None]]:
        """Span one model call; the yielded function takes the reply."""
        model = request["model"]
        attributes = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.conversation.id": episode_id,
            **{f"gen_ai.request.{key}": value for key, value in request.items() if value is not None},
        }
        with self._span(f"chat {model}", SpanKind.CLIENT, attributes) as span:
            if span is not None and self._with_content:
                span.set_attribute("gen_ai.input.messages", json.dumps([_as_parts(message) for message in messages]))

            def note(reply: Completion) -> None:
                if span is not None:
                    self._note_reply(span, model, reply)

            yield note

    @contextlib.contextmanager
    def execute_tool(self, call: Mapping[str, Any]) -> Iterator[Callable[[ToolResult], None]]:
        """Span one tool call; the yielded function takes its result."""
        name = call["function"]["name"]
        attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": name,
            "gen_ai.tool.type": "function",
            "gen_ai.tool.call.id": call["id"],
        }
        if self._with_content:
            attributes["gen_ai.tool.call.arguments"] = call["function"]["arguments"]
        with self._span(f"execute_tool {name}", SpanKind.INTERNAL, attributes) as span:

            def note(result: ToolResult) -> None:
                if span is None:
                    return
                if result.error is not None:
                    _fail(span, "tool_error")
                if self._with_content:
                    span.set_attribute("gen_ai.tool.call.result", result.content)

            yield note

    def close(self) -> None:
        """Export the queued spans, for `CLOSE_MILLIS` at most. Blocks: call it in a thread."""
        if self._provider is not None:
            self._provider.force_flush(CLOSE_MILLIS)
            self._provider.shutdown()

    def _note_reply(self, span: Span, model: str, reply: Completion) -> None:
        span.set_attributes(
            {
                "gen_ai.response.model": model,
                "gen_ai.response.finish_reasons": (reply.finish_reason,),
                "gen_ai.usage.input_tokens": len(reply.prompt_token_ids),
                "gen_ai.usage.output_tokens": len(reply.output_token_ids),
            }
        )
        if self._with_content:
            message = {**_as_parts(reply.as_message()), "finish_reason": reply.finish_reason}
            span.set_attribute("gen_ai.output.messages", json.dumps([message]))

    @contextlib.contextmanager
    def _span(self, name: str, kind: SpanKind, attributes: Attributes) -> Iterator[Span | None]:
        if self._tracer is None:
            yield None
            return
        with self._tracer.start_as_current_span(
            name, kind=kind, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                _fail(span, type(error).__name__)
                raise


def open_tracing(environ: Mapping[str, str]) -> Tracing:
    """Return the tracing that the standard variables configure; without an exporter and an endpoint, none.

    Raises:
        ValueError: an exporter or a protocol that is not supported.
    """
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Tracing()
    has_endpoint = any(environ.get(name) for name in ENDPOINTS)
    wanted = environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if has_endpoint else "none")
    names = [name.strip() for name in wanted.split(",") if name.strip() not in ("", "none")]
    if not names:
        return Tracing()
    # Imported here, because the SDK and its exporters take half a second to load.
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    is_named = environ.get("OTEL_SERVICE_NAME") or "service.name=" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    # Never set as the process's provider: libraries that trace by themselves, such as Chroma, would export through it.
    provider = TracerProvider(resource=Resource.create({} if is_named else {"service.name": AGENT}))
    for name in names:
        provider.add_span_processor(BatchSpanProcessor(_make_exporter(name, environ)))
    return Tracing(
        provider.get_tracer("ratchet"), provider=provider, with_content=environ.get(CONTENT, "").lower() == "true"
    )


def _make_exporter(name: str, environ: Mapping[str, str]) -> SpanExporter:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if name != "otlp":
        raise ValueError(f"OTEL_TRACES_EXPORTER names {name!r}: choose among 'otlp', 'console' and 'none'")
    protocol = next((environ[key] for key in PROTOCOLS if environ.get(key)), "http/protobuf")
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    elif protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    else:
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}: choose 'http/protobuf' or 'grpc'")
    return OTLPSpanExporter()


def _note_trajectory(span: Span, trajectory: Trajectory) -> None:
    span.set_attribute("ratchet.trajectory.stage", trajectory.stage.value)
    if trajectory.closed_at is not None:  # the sums are zero until then
        span.set_attributes(
            {
                "gen_ai.usage.input_tokens": trajectory.prompt_tokens,
                "gen_ai.usage.output_tokens": trajectory.output_tokens,
            }
        )
    if trajectory.stage is TrajectoryStage.FAILED:
        _fail(span, read_error(trajectory.error)[0] or "error")


def _fail(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


def _as_parts(message: Message) -> Attributes:
    """Return a message in the format of the conventions: a role and parts."""
    content = message.get("content") or ""
    if message["role"] == "tool":
        part = {"type": "tool_call_response", "id": message.get("tool_call_id"), "response": content}
        return {"role": "tool", "parts": [part]}
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    parts: list[Attributes] = [{"type": "text", "content": text} for text in texts if text]
    for call in message.get("tool_calls") or ():
        function = call["function"]
        parts.append(
            {"type": "tool_call", "id": call["id"], "name": function["name"], "arguments": function["arguments"]}
        )
    return {"role": message["role"], "parts": parts}
