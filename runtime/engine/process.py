"""Supervises the vLLM server process: starts it, proves it by a real token, watches it, and restarts it when it dies.

    find the model -> start the child -> follow its log to the first token -> watch -> end it, start another ->
    on_restart

`watch` finds a dead child at once, and a zombie (a child that runs but generates no token) within the pause between two
probes and the time of one. Between `suspend` and `resume` there is no child and its memory is free; only `watch` ends
and starts children after the first start, so that one task alone decides about them.

Invariants: while `is_ready`, the server generated a token since its last start; the child dies with this process,
however that ends; it listens on the loopback only and requires the key it was started with.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog

from memory.chat_marks import ANY_FAMILY, ChatMarks
from runtime.config import EngineConfig
from runtime.engine.activity import ProcessActivity, is_held_up, is_newly_stopped, is_stopped, read_activity
from runtime.engine.client import EngineClient
from runtime.engine.model_families import DEFAULT_TEMPERATURE, EmbeddedModel, choose_model, embedded_model, find_model
from runtime.engine.server_command import BASE, KEY_VARIABLE, server_arguments, server_environment
from runtime.engine.tool_format import read_chat_template, shows_tools
from runtime.errors import EngineError, PolicyError

log = structlog.get_logger()

OnProgress = Callable[[str], None]

# Run as a file: it imports nothing of ours, so that little time passes before it calls prctl.
CHILD = Path(__file__).with_name("child.py")
NO_TOOLS = (
    "the model's chat template shows no tools, so they would be dropped: give one that does with "
    'engine.extra_args = ["--chat-template", "FILE"]; an engine at engine.url must be started with it, too'
)
STOP_SECONDS = 10.0
RECOVERY_PAUSE_SECONDS = 0.25
LONGEST_STALL_SECONDS = 300.0
"""The longest time without a token that is accepted while other processes keep the engine from the processor."""
EARLY_SHARE = 0.1
"""The part of a probe's time after which the activity of the engine's processes is read."""
OWN_DELAY_SECONDS = 1.0
"""A check that ends this much too late was delayed by this process, and proves nothing about the engine."""
STOPPED_SECONDS = 0.5
"""How long a process that was stopped during a check is looked at again."""
BACKOFF_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)

# Texts in the log of a starting engine, in their order, and the progress that each of them reports.
PHASES = (
    ("non-default args", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting the engine's core"),
    ("Starting to load model", "loading the weights"),
    ("KV cache size", "reserving memory for attention"),
    ("init engine", "opening its port"),
    # This one decides: a start is only complete after it. If vLLM words the others differently, only progress is lost.
    ("Application startup complete", "generating a first token"),
)
TROUBLE = re.compile(r"\b\w*(Error|Exception|error|Killed|refused)\b.*")
NOISE = re.compile(r"^\(\w+[^)]*pid=\d+\)\s*|^(INFO|WARNING|ERROR) [\d-]+ [\d:]+ \[[^\]]*\]\s*")


class Engine:
    """Supervises one vLLM server: one that this process starts, or one that already runs at `config.url`."""

    def __init__(
        self,
        config: EngineConfig,
        data_dir: Path,
        *,
        made_for: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Prepare the supervision; nothing is started. `made_for`: the base model of the data directory's policies."""
        # Our own server gets a new key, so that other users of this machine cannot call it directly.
        self._api_key = os.environ.get(KEY_VARIABLE, "") if config.url else secrets.token_urlsafe(32)
        self.config = config
        self.model_name = choose_model(config.model, made_for)
        """The result of `find_model`; without a meaning for an external engine."""
        self.client = EngineClient(
            config.url or "", BASE, timeout_seconds=config.call_timeout_seconds, api_key=self._api_key
        )
        """Calls to the server; its `url` changes when the server is started on another port."""
        self.log_path = data_dir / "logs" / "engine.log"
        self.model_path: Path | None = None
        """The base model's directory; None for an external engine whose model is not on this machine."""
        self.on_restart: Callable[[], Awaitable[None]] | None = None
        """Awaited after each restart, before the engine is ready again."""
        self.max_model_len: int | None = None
        """Limit of prompt and answer together, in tokens; None before the start, or if the engine does not report
        it."""
        self.takes_tools = True
        """Whether the model's chat template shows tools; assumed where the model's directory is not known."""
        self.num_restarts = 0
        self._on_progress = on_progress or (lambda text: None)
        self._process: asyncio.subprocess.Process | None = None
        self._ready = asyncio.Event()
        self._is_stopped = False
        self._stalled_since: float | None = None
        """Time (monotonic) since which no token was generated although the engine may be sound; None while tokens
        are."""
        self._suspended = asyncio.Event()
        """Set by `suspend` and cleared only by `watch`, which must not miss a suspension that is withdrawn at once."""
        self._is_down = asyncio.Event()
        self._resumed = asyncio.Event()
        self._resumed.set()

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def model(self) -> str:
        """The name under which the bare base model is served."""
        return self.client.model

    @property
    def is_ready(self) -> bool:
        """Whether the server generated a token since its last start and is not known to have failed."""
        return self._ready.is_set()

    @property
    def is_ours(self) -> bool:
        """Whether this process started the server and may end it."""
        return self.config.url is None

    @property
    def embedded(self) -> EmbeddedModel | None:
        """The embedded model that it serves; None if it serves another one or is external."""
        return embedded_model(self.model_name) if self.is_ours else None

    @property
    def can_converse(self) -> bool:
        """Whether its model answers questions and writes prose, as all do but an embedded one that says otherwise."""
        return self.embedded is None or self.embedded.can_converse

    @property
    def can_be_critic(self) -> bool:
        """Whether its model can be the critic, which the embedded ones are too small for (docs/models.md)."""
        return self.embedded is None

    @property
    def made_to_play(self) -> str | None:
        """The environment that its model is made to play, if it is made for one."""
        return self.embedded.environment if self.embedded is not None else None

    @property
    def model_temperature(self) -> float:
        """The sampling temperature that suits its model."""
        return DEFAULT_TEMPERATURE if self.embedded is None else self.embedded.temperature

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the server, or connect to the external one, and return once it generated a token.

        Raises:
            EngineError: it does not come up; the message holds the last errors of its log and the log's path.
            ValueError: the settings name no model, or what is neither a directory of one nor an id.
            OSError: the hub, or an embedded model's package, does not have it or cannot be reached.
        """
        # On any failure, Ctrl-C included, no half-started child may stay behind.
        async with contextlib.AsyncExitStack() as on_failure:
            on_failure.push_async_callback(self.stop)
            if self.is_ours:
                self._on_progress("finding the model")
                self.model_path = await asyncio.to_thread(find_model, self.model_name)
                await self._read_model()
                await self._start_child()
                self.max_model_len = (await self._find_base()).get("max_model_len")
            else:
                await self._connect_external()
            on_failure.pop_all()
        self._ready.set()

    async def stop(self) -> None:
        """End the child and every process that it started; an external server goes on."""
        # Before the child ends: `watch` must find the engine stopped, not dead, or it starts another.
        self._is_stopped = True
        self._ready.clear()
        self._is_down.set()
        self._resumed.set()
        await self._end_child()
        await self.client.close()

    @property
    def is_suspended(self) -> bool:
        """Whether `suspend` was called and `resume` was not yet."""
        return not self._resumed.is_set()

    async def suspend(self) -> None:
        """End the server; its memory is free when this returns. `watch` must be running, and `resume` must follow even
        if this is cancelled.

        Raises:
            EngineError: the server is an external one, or was stopped for good.
        """
        if not self.is_ours:
            raise EngineError(f"the engine at {self.config.url!r} was not started here and cannot be stopped from here")
        self._ready.clear()
        self._resumed.clear()
        self._suspended.set()
        await self._is_down.wait()
        if self._is_stopped:
            raise EngineError("the engine was stopped")

    def resume(self) -> None:
        """Let `watch` start the server again; `wait_until_ready` waits for its first token and its adapters."""
        self._resumed.set()

    async def wait_until_ready(self, timeout_seconds: float) -> None:
        """Wait for a restart to end. Raises EngineError after `timeout_seconds`."""
        if self.is_ready:
            return
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._ready.wait()
        except TimeoutError:
            raise EngineError(f"the engine is not ready; its log is {self.log_path}") from None

    async def recover(self) -> None:
        """Wait without a limit until the engine generates a token again. For callers whose call was lost."""
        while True:
            await self._ready.wait()
            # A token, not `is_ready` alone: a dead engine may not have been noticed yet.
            if await self._probe_within(self.config.probe_timeout_seconds):
                return
            await asyncio.sleep(RECOVERY_PAUSE_SECONDS)

    async def watch(self) -> None:
        """Probe until the engine is stopped; restart our own server when it is dead or a zombie."""
        while True:
            await self._wait_for_trouble_or_suspension()
            if self._is_stopped:
                return
            self._ready.clear()
            if self._suspended.is_set():
                await self._stay_down()
                await self._restart(is_planned=True)
            elif self.is_ours:
                await self._restart()
            else:
                await self._wait_for_external()
            if self._is_stopped:
                return
            if self._suspended.is_set():
                continue
            self._ready.set()
            self._on_progress("the engine is ready again")

    async def _wait_for_trouble_or_suspension(self) -> None:
        trouble = asyncio.ensure_future(self._wait_for_trouble())
        suspension = asyncio.ensure_future(self._suspended.wait())
        try:
            await asyncio.wait({trouble, suspension}, return_when=asyncio.FIRST_COMPLETED)
            if trouble.done():
                # Raises what the task raised: an error here is a bug, not a dead engine.
                trouble.result()
        finally:
            trouble.cancel()
            suspension.cancel()

    async def _stay_down(self) -> None:
        """End the child gracefully, and return when the engine may run again."""
        log.info("engine suspended")
        await self._end_child()
        self._is_down.set()
        while self.is_suspended:  # it may be suspended again before this task runs
            await self._resumed.wait()
        self._suspended.clear()
        self._is_down.clear()

    async def _wait_for_trouble(self) -> None:
        exited = asyncio.ensure_future(self._process.wait()) if self._process is not None else None
        try:
            while True:
                if exited is None:
                    await asyncio.sleep(self.config.probe_interval_seconds)
                elif (await asyncio.wait({exited}, timeout=self.config.probe_interval_seconds))[0]:
                    log.error("engine died", exit_code=exited.result(), log=str(self.log_path))
                    return
                if not await self._is_alive(exited):
                    log.error("engine is a zombie: no token moves", log=str(self.log_path))
                    return
        finally:
            if exited is not None:
                exited.cancel()

    async def _is_alive(self, exited: asyncio.Future[int] | None) -> bool:
        """Return whether the engine generates tokens, by a probe of one token.

        A late probe is no proof of death while the engine's count of tokens grows or a first count arrives only late.
        An engine that other work keeps from the processor gets `LONGEST_STALL_SECONDS`.

        Takes at most `probe_timeout_seconds`: two thirds for the probe and the first count, one third for the last; and
        `STOPPED_SECONDS` where a process was stopped meanwhile.
        """
        look_seconds = self.config.probe_timeout_seconds / 3
        began, patience = time.monotonic(), 2 * look_seconds
        probe = asyncio.ensure_future(self.client.probe())
        before = asyncio.ensure_future(self._count_tokens(patience))
        watched = {probe} if exited is None else {probe, exited}
        activity = None
        try:
            # Most probes are answered at once, and reading /proc costs time.
            await asyncio.wait(watched, timeout=patience * EARLY_SHARE, return_when=asyncio.FIRST_COMPLETED)
            if not any(task.done() for task in watched):
                activity = await self._read_activity(), time.monotonic()
                rest_seconds = began + patience - time.monotonic()
                await asyncio.wait(watched, timeout=max(0.0, rest_seconds), return_when=asyncio.FIRST_COMPLETED)
            if exited is not None and exited.done():
                return True  # the caller notices that the child exited
            if probe.done() and probe.result():
                self._stalled_since = None
                return True
            # A rejected probe ends at once; then only a growing count proves that the engine works.
            rest_seconds = began + patience - time.monotonic()
            await asyncio.sleep(max(0.0, min(look_seconds, rest_seconds)))
            first = before.result() if before.done() else None
            last = await self._count_tokens(look_seconds)
            # A growing count: the probe waits behind other calls. No first count: the engine's own loop was busy.
            if last is not None and (first is None or last > first):
                self._stalled_since = None
                return True
            is_late = time.monotonic() - began > self.config.probe_timeout_seconds + OWN_DELAY_SECONDS
            is_slow = is_late or (activity is not None and await self._is_held_up(*activity, last))
            return is_slow and self._may_stall()
        finally:
            probe.cancel()
            before.cancel()

    async def _read_activity(self) -> dict[int, ProcessActivity]:
        """Return the activity of the engine's processes so far; empty for an external engine."""
        return await asyncio.to_thread(read_activity, self.pid) if self.pid is not None else {}

    async def _is_held_up(self, before: dict[int, ProcessActivity], since: float, count: float | None) -> bool:
        """Return whether the engine waits for the processor. A server process that answered with a `count` does not
        wait, so then only the processes behind it are compared."""
        after = await self._read_activity()
        # it was stopped during this look: in the next one it would be found too late
        if is_newly_stopped(before, after):
            await asyncio.sleep(STOPPED_SECONDS)
            later = await self._read_activity()
            if is_stopped(after, later):
                return False
            after = later
        answered = None if count is None else self.pid
        return is_held_up(before, after, time.monotonic() - since, without=answered)

    def _may_stall(self) -> bool:
        """Return whether an engine that seems slow may have more time."""
        if self._stalled_since is None:
            log.warning("engine is slow: other work keeps it from the processor", log=str(self.log_path))
            self._stalled_since = time.monotonic()
        return time.monotonic() - self._stalled_since < LONGEST_STALL_SECONDS

    async def _probe_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self.client.probe()
        except TimeoutError:
            return False

    async def _count_tokens(self, seconds: float) -> float | None:
        """Return the number of tokens that the engine has processed so far; None if it does not answer in time."""
        try:
            async with asyncio.timeout(seconds):
                return await self.client.num_tokens_so_far()
        except (TimeoutError, PolicyError):
            return None

    async def _restart(self, *, is_planned: bool = False) -> None:
        """End the rest of the child and start another, until one is up with its adapters or the engine is stopped."""
        # No limit: every caller has its own deadline, and only `stop` and `suspend` end this.
        for attempt in itertools.count():
            await self._end_child(signal.SIGKILL)  # a dead or stuck child does not end gracefully
            # Not interrupted: `suspend` waits for the rest of this pause.
            await asyncio.sleep(BACKOFF_SECONDS[min(attempt, len(BACKOFF_SECONDS) - 1)])
            if self._is_stopped or self._suspended.is_set():
                return
            if attempt or not is_planned:
                self.num_restarts += 1
            log.warning("restarting the engine", attempt=attempt + 1)
            try:
                await self._start_child()
                if self.on_restart is not None:
                    await self.on_restart()
                return
            except (EngineError, PolicyError, OSError) as error:  # OSError: the log cannot be written on a full disk
                log.error("engine did not come up", error=str(error))

    async def _wait_for_external(self) -> None:
        while not await self._probe_within(self.config.probe_timeout_seconds):
            await asyncio.sleep(self.config.probe_interval_seconds)
        if self.on_restart is not None:
            await self.on_restart()

    async def _connect_external(self) -> None:
        """Read the model's name and limits from the engine at `config.url`."""
        self._on_progress(f"looking for the engine at {self.url}")
        base = await self._find_base()
        self.client.model, self.max_model_len = base["id"], base.get("max_model_len")
        root = Path(self.config.model or base.get("root") or "")
        self.model_path = root.resolve() if (root / "config.json").is_file() else None
        await self._read_model()
        if not await self._probe_within(self.config.startup_seconds):
            raise EngineError(f"the engine at {self.config.url!r} generates no token")

    async def _read_model(self) -> None:
        """Read whether the model's chat template shows tools, and the special tokens of its tokenizer, which no text in
        a prompt may contain. Without the tokenizer's files, those of all model families are removed."""
        self.client.marks = await asyncio.to_thread(ChatMarks.read, self.model_path) or ANY_FAMILY
        if self.model_path is not None:
            self.takes_tools = shows_tools(read_chat_template(self.model_path, self.config.extra_args))
        if not self.takes_tools:
            log.warning(f"requests with tools are refused: {NO_TOOLS}")

    async def _find_base(self) -> dict[str, Any]:
        """Return the engine's entry of its base model. Raises EngineError: there is none, or it does not answer."""
        try:
            models = await self.client.models()
        except PolicyError as error:
            raise EngineError(f"no engine answers at {self.url!r}: {error}") from error
        base = next((model for model in models if not model.get("parent")), None)
        if base is None:
            raise EngineError(f"the engine at {self.url!r} serves no base model")
        return base

    async def _start_child(self) -> None:
        assert self.model_path is not None
        port = self.config.port or _find_free_port()
        self.client.url = f"http://127.0.0.1:{port}"
        arguments = server_arguments(self.config, self.model_path, port)
        self.client.has_priorities = self.client.enforces_schemas = True
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        # One earlier log is kept, because it explains the crash that led to this start.
        if self.log_path.exists():
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        with self.log_path.open("wb") as log_file:
            # In a session of its own: Ctrl-C in the terminal then reaches only this process, which ends the child.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(CHILD),
                str(os.getpid()),
                *arguments,
                # Our key is last, because an inherited VLLM_API_KEY must not win.
                env=os.environ | server_environment(self.config) | {KEY_VARIABLE: self._api_key},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
            )
        self._stalled_since = None
        await self._follow_startup()

    async def _follow_startup(self) -> None:
        """Report the phases in the log; return at the first generated token."""
        process = self._process
        assert process is not None
        deadline = time.monotonic() + self.config.startup_seconds
        num_phases_seen = 0
        while True:
            text = self.log_path.read_text(encoding="utf-8", errors="replace")
            while num_phases_seen < len(PHASES) and PHASES[num_phases_seen][0] in text:
                self._on_progress(PHASES[num_phases_seen][1])
                num_phases_seen += 1
            if process.returncode is not None:
                raise EngineError(self._describe_failure(f"the engine ended with exit code {process.returncode}"))
            if PHASES[-1][0] in text and await self._probe_within(deadline - time.monotonic()):
                # The engine's first computation of log-probs takes seconds: now, rather than during a swap.
                await self.client.token_logprobs(self.model, [1, 1])
                return
            if time.monotonic() > deadline:
                seconds = self.config.startup_seconds
                raise EngineError(self._describe_failure(f"the engine was not up within {seconds:g} seconds"))
            await asyncio.sleep(0.25)

    def _describe_failure(self, what: str) -> str:
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return f"{what}; its last words: {find_last_words(text)}; the whole log: {self.log_path}"

    async def _end_child(self, *signals: signal.Signals) -> None:
        """End the child's process group, by SIGTERM and then SIGKILL, or by the given signals."""
        process = self._process
        if process is None:
            return
        for one_signal in signals or (signal.SIGTERM, signal.SIGKILL):
            # Signalled in any case: the group outlives a leader that crashed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, one_signal)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
        # Only now: if this was cancelled, the next call waits for the same child.
        if self._process is process:
            self._process = None


def find_last_words(text: str) -> str:
    """Return the last lines of an engine's log that mention errors, or its last lines."""
    # Twice, because a line may have two prefixes: the process's and the logger's.
    lines = [NOISE.sub("", NOISE.sub("", line)).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    troubled = [line for line in lines if TROUBLE.search(line) and not line.startswith(("File ", "raise "))]
    return " | ".join(dict.fromkeys((troubled or lines)[-3:])) or "none"


def _find_free_port() -> int:
    # Another program may take the port before the child binds it: the child then ends, and a restart tries another
    # port.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
