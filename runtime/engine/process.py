"""The vLLM server process: started, proved by a real token, watched, started again when it dies.

Refuses to know what is asked of it (completion.py), and which adapters it wears (hotswap.py, by way of `on_restart`).
Flow: find the model -> start the child -> follow its log until a real token came -> watch: a dead child at once, a
zombie (alive, but no token moves) within seconds -> end it, start another, let `on_restart` dress it -> ready again.
Between `suspend` and `resume` there is no child, and its memory is free; `watch` ends it and starts the next, so that
one task alone decides about children.

Invariants: while `is_ready`, a real token was generated since the last start; a zombie is found within the pause
between two probes and the time of one; the child dies with this process, however that ends; it listens on the loopback
alone, and answers nobody there who does not know the key it was started with.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import itertools
import json
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
from runtime.engine.activity import ProcessActivity, is_held_up, read_activity
from runtime.engine.client import EngineClient
from runtime.engine.cpu_workarounds import idle_wait as engine_idle
from runtime.engine.model_families import find_model
from runtime.engine.tool_format import choose_tool_call_parser, read_chat_template, shows_tools
from runtime.errors import EngineError, PolicyError

log = structlog.get_logger()

OnProgress = Callable[[str], None]

HOME = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("child.py")
NO_TOOLS = (
    "the model's chat template shows no tools: requests with tools are refused; give a template that does with "
    'engine.extra_args = ["--chat-template", "<file>"]'
)
TOOL_CALLS = Path(__file__).with_name("tool_call_grammar.py")
COMPACT_JSON = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
"""Small models fill JSON with white space until the length limit. Only these two backends can forbid it, and of them
only xgrammar knows the grammars of tool calls."""
CPU_FIX = "runtime.engine.cpu_workarounds.worker.WorkerFixes"
CPU_BLOCK_TOKENS = 32
"""What a prompt shares with an earlier one is found again in whole blocks: with vLLM's 128, a turn reads most of the
last one anew."""
KEY_VARIABLE = "VLLM_API_KEY"
"""Whence vLLM takes the key it asks for: unlike an argument, no other user can read it. Guards all routes under /v1."""
BASE = "base"
"""The name under which the bare base model is served."""
STOP_SECONDS = 10.0
RECOVERY_PAUSE_SECONDS = 0.25
LONGEST_STALL_SECONDS = 300.0
"""How long an engine may go without a token while other work keeps it from the processor."""
EARLY_SHARE = 0.1
"""The part of a probe's time after which it is worth looking at what the engine's processes do."""
OWN_DELAY_SECONDS = 1.0
"""A look that ends so much later than it should says more of this process than of the engine."""
BACKOFF_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)

# What the engine's log says as it starts, in this order, and what that means to who waits.
PHASES = (
    ("non-default args", "reading the model's configuration"),
    ("Initializing a V1 LLM engine", "starting the engine's core"),
    ("Starting to load model", "loading the weights"),
    ("KV cache size", "reserving memory for attention"),
    ("init engine", "opening its port"),
    ("Application startup complete", "generating a first token"),
)
TROUBLE = re.compile(r"\b\w*(Error|Exception|error|Killed|refused)\b.*")
NOISE = re.compile(r"^\(\w+[^)]*pid=\d+\)\s*|^(INFO|WARNING|ERROR) [\d-]+ [\d:]+ \[[^\]]*\]\s*")


class Engine(EngineClient):
    """One vLLM server, ours or one that already runs."""

    def __init__(self, config: EngineConfig, data_dir: Path, *, on_progress: OnProgress | None = None) -> None:
        # Ours gets a key of its own, so that other users of this machine cannot ask it past us.
        api_key = os.environ.get(KEY_VARIABLE) if config.url else secrets.token_urlsafe(32)
        super().__init__(config.url or "", BASE, timeout_seconds=config.call_timeout_seconds, api_key=api_key)
        self.config = config
        self.log_path = data_dir / "logs" / "engine.log"
        self.model_path: Path | None = None
        """The base model's directory; None when a foreign engine serves one that isn't here."""
        self.on_restart: Callable[[], Awaitable[None]] | None = None
        """Awaited after each restart, before the engine is ready again."""
        self.max_model_len: int | None = None
        """The longest prompt and answer together that is served; None until it is up, or if it does not say."""
        self.takes_tools = True
        """Whether the model's chat template shows tools to it; an engine elsewhere is assumed to."""
        self.num_restarts = 0
        self._on_progress = on_progress or (lambda text: None)
        self._process: asyncio.subprocess.Process | None = None
        self._ready = asyncio.Event()
        self._is_stopped = False
        self._stalled_since: float | None = None
        """Since when no token has moved although the engine may yet be sound; on the monotonic clock."""
        self._suspended = asyncio.Event()
        """Set by `suspend`, cleared by `watch` alone: it must not miss a suspension that was soon withdrawn."""
        self._is_down = asyncio.Event()
        self._resumed = asyncio.Event()
        self._resumed.set()

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    @property
    def is_ours(self) -> bool:
        """Whether this process started the server and may end it."""
        return self.config.url is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the server, or find the one that runs, and return once it generated a token.

        Raises:
            EngineError: it doesn't come up; the message holds its last words and the log's path.
            ValueError: the settings name no model, or one of an unknown family.
        """
        async with contextlib.AsyncExitStack() as on_failure:  # Ctrl-C included: no half-started child stays behind
            on_failure.push_async_callback(self.stop)
            if self.is_ours:
                self._on_progress("finding the model")
                self.model_path = await asyncio.to_thread(find_model, self.config.model)
                await self._learn_marks()
                self.takes_tools = shows_tools(read_chat_template(self.model_path, self.config.extra_args))
                if not self.takes_tools:
                    log.warning(NO_TOOLS)
                await self._start_child()
                self.max_model_len = (await self._find_base()).get("max_model_len")
            else:
                await self._meet_foreign()
            on_failure.pop_all()
        self._ready.set()

    async def stop(self) -> None:
        """End the child, if it is ours, and every process it started."""
        self._is_stopped = True
        self._ready.clear()
        self._is_down.set()
        self._resumed.set()
        await self._end_child()
        await self.close()

    @property
    def is_suspended(self) -> bool:
        """Whether it was told to be down, and not yet to come back."""
        return not self._resumed.is_set()

    async def suspend(self) -> None:
        """End the server; when this returns its memory is free. `watch` must be running, and `resume` must follow,
        also when this was cancelled.

        Raises:
            EngineError: the server is not ours to end, or was stopped for good.
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
        """Return when a token comes again, after a call that lost the engine: it may be ready, only stumble, or be dead
        without anybody having noticed yet. Waits as long as the caller does."""
        while True:
            await self._ready.wait()
            if await self._probe_within(self.config.probe_timeout_seconds):
                return
            await asyncio.sleep(RECOVERY_PAUSE_SECONDS)

    async def watch(self) -> None:
        """Probe until the engine is stopped; restart a server of ours that is dead or a zombie."""
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
                await self._await_foreign()
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
                trouble.result()
        finally:
            trouble.cancel()
            suspension.cancel()

    async def _stay_down(self) -> None:
        """End the child in good order, and return when the engine may run again."""
        log.info("engine suspended")
        await self._end_child()
        self._is_down.set()
        while self.is_suspended:  # suspended again before this task came to its turn: still down
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
        """Probe by one token. A probe that waits behind others is no proof of death while their tokens move, nor is a
        count of them that came only now: the engine's own loop was busy, and is looked at again. An engine that other
        work keeps from the processor is slow, and gets `LONGEST_STALL_SECONDS`.

        Takes `probe_timeout_seconds` at most: two thirds for the probe and the first look, one for the last.
        """
        look_seconds = self.config.probe_timeout_seconds / 3
        began, patience = time.monotonic(), 2 * look_seconds
        probe = asyncio.ensure_future(self.probe())
        before = asyncio.ensure_future(self._count_tokens(patience))
        watched = {probe} if exited is None else {probe, exited}
        activity = None
        try:
            # Most probes are answered at once, and reading about processes has a price.
            await asyncio.wait(watched, timeout=patience * EARLY_SHARE, return_when=asyncio.FIRST_COMPLETED)
            if not any(task.done() for task in watched):
                activity = await self._read_activity(), time.monotonic()
                rest_seconds = began + patience - time.monotonic()
                await asyncio.wait(watched, timeout=max(0.0, rest_seconds), return_when=asyncio.FIRST_COMPLETED)
            if exited is not None and exited.done():
                return True  # the next look at `exited` tells
            if probe.done() and probe.result():
                self._stalled_since = None
                return True
            # A probe that was refused ends at once; only moving tokens speak for the engine then.
            rest_seconds = began + patience - time.monotonic()
            await asyncio.sleep(max(0.0, min(look_seconds, rest_seconds)))
            first = before.result() if before.done() else None
            last = await self._count_tokens(look_seconds)
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
        """Return what the engine's processes have done so far; nothing of an engine that was not started here."""
        return await asyncio.to_thread(read_activity, self.pid) if self.pid is not None else {}

    async def _is_held_up(self, before: dict[int, ProcessActivity], since: float, count: float | None) -> bool:
        """Return whether the engine waits for the processor. A server that answers with a `count` of tokens does not:
        then it is the turn of the processes behind it."""
        after = await self._read_activity()
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
                return await self.probe()
        except TimeoutError:
            return False

    async def _count_tokens(self, seconds: float) -> float | None:
        """Return how many tokens the engine has moved so far; None if it doesn't say within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                return await self.num_tokens_so_far()
        except (TimeoutError, PolicyError):
            return None

    async def _restart(self, *, is_planned: bool = False) -> None:
        """End what is left of the child and start another, until one is up and dressed, or none is wanted any more."""
        for attempt in itertools.count():
            await self._end_child(signal.SIGKILL)  # nothing dead or stuck ends in good order
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
            except (EngineError, PolicyError, OSError) as error:  # OSError: a full disk takes no log
                log.error("engine did not come up", error=str(error))

    async def _await_foreign(self) -> None:
        while not await self._probe_within(self.config.probe_timeout_seconds):
            await asyncio.sleep(self.config.probe_interval_seconds)
        if self.on_restart is not None:
            await self.on_restart()

    async def _meet_foreign(self) -> None:
        """Learn what the engine at `config.url` serves."""
        self._on_progress(f"looking for the engine at {self.url}")
        base = await self._find_base()
        self.model, self.max_model_len = base["id"], base.get("max_model_len")
        root = Path(self.config.model or base.get("root") or "")
        self.model_path = root.resolve() if (root / "config.json").is_file() else None
        await self._learn_marks()
        if not await self._probe_within(self.config.startup_seconds):
            raise EngineError(f"the engine at {self.config.url!r} generates no token")

    async def _learn_marks(self) -> None:
        """Read which special tokens the model's tokenizer has; without its files, all families' are broken."""
        self.marks = await asyncio.to_thread(ChatMarks.read, self.model_path) or ANY_FAMILY

    async def _find_base(self) -> dict[str, Any]:
        """Return what the engine says of its base model. Raises EngineError: nothing, or it doesn't answer."""
        try:
            models = await self.models()
        except PolicyError as error:
            raise EngineError(f"no engine answers at {self.url!r}: {error}") from error
        base = next((model for model in models if not model.get("parent")), None)
        if base is None:
            raise EngineError(f"the engine at {self.url!r} serves no base model")
        return base

    async def _start_child(self) -> None:
        assert self.model_path is not None
        port = self.config.port or _find_free_port()
        self.url = f"http://127.0.0.1:{port}"
        arguments = server_arguments(self.config, self.model_path, port)
        self._has_priorities = self._enforces_schemas = True
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists():
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        with self.log_path.open("wb") as log_file:
            # A session of its own: Ctrl-C in the terminal reaches us, and we end the child in good order.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(CHILD),
                str(os.getpid()),
                *arguments,
                env=os.environ | server_environment(self.config) | {KEY_VARIABLE: self._api_key},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
            )
        self._stalled_since = None
        await self._follow_startup()

    async def _follow_startup(self) -> None:
        """Report the phases that the log shows; return at the first real token."""
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
                # The engine's first look at log-probs takes seconds; better now than in the middle of a swap.
                await self.token_logprobs(self.model, [1, 1])
                return
            if time.monotonic() > deadline:
                seconds = self.config.startup_seconds
                raise EngineError(self._describe_failure(f"the engine was not up within {seconds:g} seconds"))
            await asyncio.sleep(0.25)

    def _describe_failure(self, what: str) -> str:
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return f"{what}; its last words: {find_last_words(text)}; the whole log: {self.log_path}"

    async def _end_child(self, *signals: signal.Signals) -> None:
        """End the child's whole process group: in good order first, then for certain, or as told.

        Cancelled in between, it is still ours to end: whoever is told to next waits for it.
        """
        process = self._process
        if process is None:
            return
        for one_signal in signals or (signal.SIGTERM, signal.SIGKILL):
            # The group outlives its leader when that one crashed, so it is signalled in any case.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, one_signal)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
        if self._process is process:
            self._process = None


def server_arguments(config: EngineConfig, model_path: Path, port: int) -> list[str]:
    """Return vLLM's command line."""
    template = read_chat_template(model_path, config.extra_args)
    parser = config.tool_call_parser or choose_tool_call_parser(model_path, template)
    arguments = {
        "model": model_path,
        "served-model-name": BASE,
        "max-loras": config.max_loras,
        "max-cpu-loras": max(config.max_cpu_loras, config.max_loras),
        "max-lora-rank": config.max_lora_rank,
        "tool-call-parser": parser,
        "tool-parser-plugin": TOOL_CALLS,
        # Grammars for Mistral's own tokenizer need another backend, which only vLLM's automatic choice takes.
        "structured-outputs-config": None if (model_path / "tekken.json").is_file() else COMPACT_JSON,
        "scheduling-policy": "priority",
        "max-num-seqs": config.max_num_seqs,
        "generation-config": "vllm",  # the model's own sampling defaults would surprise
        "max-model-len": config.max_model_len,
    }
    flags = ["enable-lora", "enable-auto-tool-choice", "disable-uvicorn-access-log"]
    if is_cpu_build():
        arguments["dtype"] = "bfloat16"
        arguments["worker-extension-cls"] = CPU_FIX
        arguments["block-size"] = CPU_BLOCK_TOKENS
        flags.append("enforce-eager")
    else:
        arguments["gpu-memory-utilization"] = config.gpu_memory_utilization
    given = [part for key, value in arguments.items() if value is not None for part in (f"--{key}", str(value))]
    # Last, so that no extra argument moves it: several of vLLM's routes ask nobody for a key.
    place = ["--host", "127.0.0.1", "--port", str(port)]
    return [*given, *(f"--{flag}" for flag in flags), *config.extra_args, *place]


def server_environment(config: EngineConfig) -> dict[str, str]:
    """Return what the child's environment has beyond ours."""
    return {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_LOGGING_LEVEL": "INFO",  # its log is how we follow it; libraries imported here may have turned it down
        "VLLM_NO_USAGE_STATS": "1",
        **({engine_idle.MARK: "1"} if is_cpu_build() else {}),
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a directory by now
        "PYTHONUNBUFFERED": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the numbers of nvidia-smi, as the trainer counts them too
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HOME), os.environ.get("PYTHONPATH")))),  # for CPU_FIX
    }


def is_cpu_build() -> bool:
    """Return whether the installed vLLM is the one for CPUs."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def find_last_words(text: str) -> str:
    """Return what an engine's log says of its trouble: the last lines that speak of errors, or just the last."""
    lines = [NOISE.sub("", NOISE.sub("", line)).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    troubled = [line for line in lines if TROUBLE.search(line) and not line.startswith(("File ", "raise "))]
    return " | ".join(dict.fromkeys((troubled or lines)[-3:])) or "none"


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
