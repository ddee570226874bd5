"""The process behind `serve`: it opens memory, starts the engine, announces the address, answers, and stops in order.

Invariant: the listening socket is taken before anything slow begins, and every child process has ended when this
returns, whatever ended it.
Hazard: the order of the steps in `live` matters; each one uses what an earlier one opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.cli.options import DEFAULT_URL
from runtime.cli.output import Failure, print_result
from runtime.engine.model_families import EMBEDDED

if TYPE_CHECKING:
    from memory.records.keys import Keys
    from memory.store import Memory
    from runtime.api.services import Services
    from runtime.cli.render import Phases
    from runtime.config import RuntimeSettings
    from runtime.engine.process import Engine

STOP_SECONDS = 10
M_ARENA_MAX = -8
"""Of glibc's malloc.h."""
NUM_ARENAS = 2

Compose = Callable[["Memory", "Phases"], "Services"]
"""Makes every part of the server around an open memory; `serve.py` has it."""


def prepare_environment(settings: RuntimeSettings) -> None:
    """Set the environment variables that libraries read, for this process and its children."""
    # Before anything heavy is imported: huggingface_hub reads its variables once, at import.
    quiet = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "ANONYMIZED_TELEMETRY": "False",
        "TOKENIZERS_PARALLELISM": "false",
        "LANGGRAPH_STRICT_MSGPACK": "true",
    }
    model = settings.engine.model
    is_here = model is None or model in EMBEDDED or Path(model).expanduser().is_dir()
    is_all_here = settings.memory.encoder == "embedded" and is_here
    if is_all_here:  # a name of the hub must still be fetched
        quiet["HF_HUB_OFFLINE"] = "1"
    for name, value in quiet.items():
        os.environ.setdefault(name, value)  # an operator's own value wins


def open_memory(settings: RuntimeSettings) -> Memory:
    """Take the data directory and open it; logs go there from now on. Raises StoreError, e.g. DataDirectoryInUse."""
    from memory.store import Memory
    from runtime.observability.logs import send_logs_to

    memory = Memory.open(settings.data, settings.memory)
    send_logs_to(memory.data_dir / "logs" / "ratchet.log")
    return memory


def limit_arenas() -> None:
    """Have all threads of this process share few arenas of memory, where the C library is glibc.

    It makes up to eight for each processor, and what a thread has freed stays in its own, so memory grew for hours. To
    wait for an arena costs nothing measurable: under Python's lock few threads allocate at the same time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, NUM_ARENAS)


async def run_server(settings: RuntimeSettings, compose: Compose, phases: Phases, *, as_json: bool) -> None:
    """Open memory, start the engine, answer requests, and stop everything on SIGINT or SIGTERM.

    Raises:
        Failure: the data directory is in use, the port is taken, the engine does not start, the address is open to
            others and there are no keys.
    """
    from memory.errors import StoreError
    from runtime.errors import EngineError

    limit_arenas()  # before there are threads
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        with listen(settings.server.host, settings.server.port) as listener:
            phases.begin(f"opening memory in {settings.data}")
            with open_memory(settings) as memory:
                require_keys_or_loopback(settings.server.host, memory.keys)
                phases.begin("loading the program")
                await live(compose(memory, phases), listener, settings, stop, phases, as_json=as_json)
    except (StoreError, EngineError, ValueError, OSError) as error:
        raise Failure(str(error)) from error


def listen(host: str, port: int) -> socket.socket:
    """Return the listening socket; taken before anything slow begins, so that a taken port is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # Otherwise a restart fails for a minute, while connections of the last process are in TIME_WAIT.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Failure(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from None
    return listener


def require_keys_or_loopback(host: str, keys: Keys) -> None:
    """Raise Failure if other machines can reach the address while no key is required."""
    if not keys.is_required and not is_loopback(host):
        raise Failure(
            f"server.host = {host!r} is open to others and no key was ever made: make one with "
            "`serve.py keys create NAME --scope admin`, or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address; a name counts if all its addresses are loopback."""
    import ipaddress

    if not host:  # every address of the machine
        return False
    try:
        addresses = {each[4][0] for each in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in addresses)


async def live(
    services: Services,
    listener: socket.socket,
    settings: RuntimeSettings,
    stop: asyncio.Event,
    phases: Phases,
    *,
    as_json: bool,
) -> None:
    """Answer from the beginning (503 while the engine starts) until `stop` is set; every child has ended on return."""
    import uvicorn

    from runtime.api.app import create_app
    from runtime.api.gateway.connections import server_config

    config = server_config(create_app(services), services.limits, timeout_graceful_shutdown=STOP_SECONDS)
    server = uvicorn.Server(config)
    # Uvicorn's own handlers would end the process before its children are stopped in order.
    server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
    answering = asyncio.ensure_future(server.serve(sockets=[listener]))
    starting = asyncio.ensure_future(start(services, settings, phases))
    settling = asyncio.ensure_future(freeze_startup_heap(services.memory))
    background: list[asyncio.Future[Any]] = []
    # Into the directory's lock: `keys` and other commands find the owner's address there.
    services.memory.set_address(url_of(listener))
    try:
        if await wait_for_first(stop, starting, answering):
            return
        parts = (services.engine.watch(), services.hotswap.follow(), services.agent.open_episodes.sweep_regularly())
        background += [asyncio.ensure_future(part) for part in parts]
        await services.cycles.resume()
        training = await services.check_training() if services.check_training is not None else None
        if training is not None and not training.is_ok:
            phases.begin(f"learning is refused: {training.detail}")
        phases.end()
        announce(services, listener, as_json=as_json)
        # A background task never ends by itself: where one does, the server stops rather than serve without it.
        await wait_for_first(stop, answering, *background)
    finally:
        phases.begin("stopping")
        server.should_exit = True
        server.force_exit = starting.cancelled() or not starting.done()
        # Not `await answering`, whose exception would skip the rest.
        await asyncio.wait({answering})
        await cancel_and_wait(starting, settling, *background)
        gc.unfreeze()  # some libraries complain of what is still there at the end
        await services.cycles.stop()
        if services.toolbox is not None:
            await services.toolbox.close()
        await services.engine.stop()
        await asyncio.to_thread(services.agent.telemetry.close)


async def freeze_startup_heap(memory: Memory) -> None:
    """Exclude all objects from garbage collection once the libraries are loaded.

    Torch and similar libraries create a million permanent objects; each full collection traverses them and paused every
    answer, on a busy machine for a second.
    """
    while not memory.index.has_vectors:
        await asyncio.sleep(1.0)
    # No collection before it: that would be such a pause, and frees little.
    gc.freeze()


async def start(services: Services, settings: RuntimeSettings, phases: Phases) -> None:
    """Start the tools and the engine, then activate the active policy: boot is the first activation."""
    from runtime.engine.process import NO_TOOLS
    from runtime.errors import AdapterError, ToolRefused
    from runtime.serving.embedded_policy import install_embedded_policy

    memory = services.memory
    # Before the engine starts: `require_ready` rejects turns until then, so a RUNNING trajectory is a dead process's.
    await memory.trajectories.close_orphans()
    phases.begin("opening tools")
    if services.toolbox is not None:
        await services.toolbox.open()
    await services.engine.start()
    tools = services.toolbox.tools if services.toolbox is not None else []
    if tools and not services.engine.takes_tools:
        raise ToolRefused(f"the server has the tools {', '.join(repr(tool.name) for tool in tools)}, and {NO_TOOLS}")
    is_new = memory.policies.find_base_model() is None
    await memory.policies.register_base(name_base(services.engine))
    embedded = services.engine.embedded
    if is_new and embedded is not None and embedded.adapter is not None:
        await install_embedded_policy(memory.policies, memory.data_dir / "adapters", embedded.adapter)
    while True:
        active = memory.policies.active()
        phases.begin(f"activating policy {active.name}")
        try:
            # Ends at the base at the latest, which has no adapter that could be refused.
            return await services.hotswap.activate(active.version)
        except AdapterError as refused:
            before = await memory.policies.rollback()
            phases.begin(f"policy {active.name} was refused ({refused}); back to {before.name}")


def name_base(engine: Engine) -> str:
    """Return the base model of new policies: the hub's id as configured, or a directory."""
    if engine.model_path is None:
        return engine.model
    name = engine.model_name
    is_id = engine.embedded is None and not Path(name).expanduser().is_dir()
    return name if is_id else str(engine.model_path)


def announce(services: Services, listener: socket.socket, *, as_json: bool) -> None:
    """Print the server's address and commands to try."""
    from runtime.cli.render import render_banner

    url = url_of(listener)
    policy = services.memory.policies.active()
    facts: dict[str, Any] = {
        "url": url,
        "policy": policy.name,
        "base_model": services.engine.embedded.title if services.engine.embedded is not None else policy.base_model,
        "data": str(services.memory.data_dir),
        "requires_key": services.memory.keys.is_required,
        "share_live": services.memory.config.share_live,
    }
    option = "" if url == DEFAULT_URL else f" --url {url}"
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else sys.executable
    text = render_banner(facts, command=f"{python} serve.py", option=option, can_converse=services.engine.can_converse)
    print_result(facts, as_json=as_json, render=lambda _: text)


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def wait_for_first(stop: asyncio.Event, *tasks: asyncio.Future[Any]) -> bool:
    """Wait until `stop` is set (True) or a task ends (False); raise the exception of a task that failed."""
    stopping = asyncio.ensure_future(stop.wait())
    try:
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return stopping in done
    finally:
        stopping.cancel()


async def cancel_and_wait(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
