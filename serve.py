"""Introduces the rooms to one another, and is the command line: the only file that knows memory, runtime and optimizer.

    serve.py serve      opens memory, starts the engine, wears the active policy, answers, learns when asked to
    serve.py doctor     looks at everything an answer depends on
    serve.py keys       says who may ask: in the data directory, or through the server that has it
    serve.py ...        every other verb talks to the running server (runtime/console/)

Refuses to do any of the work itself. Heavy packages are imported by what needs them: a client verb starts without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from runtime.cli.banner import render_banner
from runtime.cli.everyday import add_everyday_verbs
from runtime.cli.keys import add_key_verbs
from runtime.cli.output import Failure, leave, perform, run, say, watching
from runtime.cli.reviews import add_review_verbs
from runtime.cli.verbs import DEFAULT_URL, Config, Data, Json, Key, Url, add_verbs

if TYPE_CHECKING:
    from memory.records.keys import Keys
    from memory.schema import Cycle, Policy
    from memory.store import Memory
    from optimizer.config import OptimizerConfig
    from optimizer.placement import Machine
    from optimizer.seams import Seams
    from runtime.api.services import Services
    from runtime.cli.render import Phases
    from runtime.doctor import Check
    from runtime.engine.process import Engine

DEFAULT_TOML = Path("ratchet.toml")
STOP_SECONDS = 10
DRAIN_SLACK_SECONDS = 30.0
"""Beyond the longest episode, before the engine is stopped for a training in spite of one."""
OPEN_ENDED = {"allow_extra_args": True, "ignore_unknown_options": True}  # --section.key value

app = typer.Typer(
    help="An agent that answers, remembers, learns, proves that it learned, and only then swaps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
add_verbs(app)
add_review_verbs(app)
add_everyday_verbs(app)


def read_all_settings(config: Path | None, given: dict[str, str | None], extra: list[str]) -> Any:
    """Return the settings of every room: flags over environment over TOML over defaults.

    Raises:
        Failure: an unknown key or a bad value, named with the place it came from.
    """
    from pydantic import BaseModel

    from memory.config import MemoryConfig
    from optimizer.config import OptimizerConfig
    from runtime.config import AgentConfig, EngineConfig, ServerConfig, ToolsConfig
    from runtime.settings import BadSettings, parse_flags, read_settings

    class Settings(BaseModel, extra="forbid"):
        data: Path = Path(".ratchet")
        memory: MemoryConfig = MemoryConfig()
        engine: EngineConfig = EngineConfig()
        agent: AgentConfig = AgentConfig()
        tools: ToolsConfig = ToolsConfig()
        server: ServerConfig = ServerConfig()
        optimizer: OptimizerConfig = OptimizerConfig()

    toml = config or (DEFAULT_TOML if DEFAULT_TOML.exists() else None)
    try:
        flags = parse_flags(extra) | {key: value for key, value in given.items() if value is not None}
        refuse_written_password(read_settings(Settings, toml=toml, flags=flags).memory.database)
        return read_settings(Settings, toml=toml, environ=os.environ, flags=flags)
    except BadSettings as bad:
        raise Failure(str(bad), exit_code=2) from None


def refuse_written_password(database: str | None) -> None:
    """Raise Failure for a database's password in a file or on the command line, where others may read it."""
    if database is None:
        return
    from memory.storage.dialects import holds_password

    if holds_password(database):
        raise Failure(
            "memory.database holds a password: take it out and give it as PGPASSWORD, or give the whole URL as the "
            "environment variable RATCHET_MEMORY__DATABASE",
            exit_code=2,
        )


@app.command(context_settings=OPEN_ENDED)
def serve(
    context: typer.Context,
    config: Config = None,
    port: Annotated[str | None, typer.Option("--port", help="Where to listen (8080); 0 takes a free one.")] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="The loopback by default; any other address needs keys.")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Start the engine and answer. Any setting can be given as --section.key value, e.g. --engine.model X."""
    from runtime.cli.render import Phases

    settings = read_all_settings(config, {"server.port": port, "server.host": host, "data": data}, context.args)
    prepare_environment(settings)
    phases = Phases(Console(highlight=False), is_silent=as_json)
    try:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run_server(settings, phases, as_json=as_json))
    finally:
        phases.end()


def prepare_environment(settings: Any) -> None:
    """Set for this process and its children what libraries read from the environment."""
    quiet = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "ANONYMIZED_TELEMETRY": "False",
        "TOKENIZERS_PARALLELISM": "false",
        "LANGGRAPH_STRICT_MSGPACK": "true",
    }
    model = settings.engine.model
    is_all_here = settings.memory.encoder == "embedded" and (model is None or Path(model).expanduser().is_dir())
    if is_all_here:  # a name of the hub must still be fetched
        quiet["HF_HUB_OFFLINE"] = "1"
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


async def run_server(settings: Any, phases: Phases, *, as_json: bool) -> None:
    """Open, start, announce, answer, and stop every child when told to.

    Raises:
        Failure: the data directory is in use, the port is taken, the engine does not start, the address is open to
            others and there are no keys.
    """
    from memory.errors import StoreError
    from runtime.errors import EngineError

    stop = asyncio.Event()
    for one in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(one, stop.set)
    try:
        with listen(settings.server.host, settings.server.port) as listener, open_memory(settings, phases) as memory:
            refuse_open_door(settings.server.host, memory.keys)
            await live(compose(memory, settings, phases), listener, settings, stop, phases, as_json=as_json)
    except (StoreError, EngineError, ValueError, OSError) as error:
        raise Failure(str(error)) from error


def listen(host: str, port: int) -> socket.socket:
    """Return the listening socket; taken before anything slow begins, so that a taken port is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Failure(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from None
    return listener


def refuse_open_door(host: str, keys: Keys) -> None:
    """Raise Failure for an address that others reach, while nobody is asked who they are."""
    if not keys.is_required and not is_loopback(host):
        raise Failure(
            f"server.host = {host!r} is open to others and no key was ever made: make one with "
            "`serve.py keys create NAME --scope admin`, or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address; a name must lead to such addresses alone."""
    import ipaddress

    if not host:  # every address there is
        return False
    try:
        found = {each[4][0] for each in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def open_memory(settings: Any, phases: Phases) -> Memory:
    """Take the data directory and open what it holds; logs go there from now on."""
    phases.say(f"opening memory in {settings.data}")
    from memory.store import Memory
    from runtime.observability.logs import send_logs_to

    memory = Memory.open(settings.data, settings.memory)
    send_logs_to(memory.data_dir / "logs" / "ratchet.log")
    return memory


def compose(memory: Memory, settings: Any, phases: Phases) -> Services:
    """Make every part and introduce each to those it needs. Nothing runs yet."""
    phases.say("loading the program")
    from optimizer.seams import Seams, Serving
    from runtime.agent.graph import Agent
    from runtime.api.services import Services
    from runtime.engine.process import Engine
    from runtime.environments.textworld import TextWorld
    from runtime.observability.telemetry import Telemetry
    from runtime.observability.tracing import open_tracing
    from runtime.serving.hotswap import HotSwap
    from runtime.serving.maintenance import Maintenance
    from runtime.serving.text_completion import TextCompletion
    from runtime.tools.toolbox import Toolbox

    engine = Engine(settings.engine, memory.data_dir, on_progress=phases.say)
    hotswap = HotSwap(memory.policies, engine, max_lora_rank=settings.engine.max_lora_rank)
    environments = {"textworld": TextWorld(memory.data_dir / "environments")}
    toolbox = Toolbox(settings.tools, memory.retrieval.find_passages, memory.data_dir / "logs")
    telemetry = Telemetry(open_tracing(os.environ))
    agent = Agent(
        memory,
        hotswap,
        environments,
        settings.agent,
        tools=toolbox.tools,
        telemetry=telemetry,
        serve_with_memory=settings.optimizer.evaluation.serve_with_memory,
    )
    maintenance = Maintenance(
        engine, hotswap, agent.book, drain_seconds=settings.agent.max_seconds + DRAIN_SLACK_SECONDS
    )

    writer = TextCompletion(hotswap)  # judgement stays the base's, whoever acts

    async def complete(messages: list[dict[str, Any]], *, schema: dict[str, Any], max_tokens: int) -> str:
        with raising_completion_errors():
            return await writer.complete(messages, schema=schema, max_tokens=max_tokens)

    async def context_tokens() -> int | None:
        with raising_completion_errors():
            return await writer.context_tokens()

    def serving(environment: str) -> Serving:
        temperature = agent.temperature_of(agent.environment(environment) if environment else None)
        return Serving(temperature=temperature, use_memory=agent.serve_with_memory)

    seams = Seams(
        rollout=agent.rollout,
        sealed_tasks=lambda environment, num_tasks: agent.environment(environment).sealed_tasks(num_tasks),
        serving=serving,
        tasks=lambda environment, split, num_tasks, offset=0: agent.environment(environment).tasks(
            split, num_tasks, offset=offset
        ),
        prepare=lambda tasks, on_progress=None: agent.environment(tasks[0].environment).prepare(tasks, on_progress),
        # The pocket model cannot write prose; lessons come from counting then.
        complete=complete if settings.engine.model or settings.engine.url else None,
        context_tokens=context_tokens,
        inspect_machine=lambda: inspect_machine(engine),
        open_window=maintenance.window,
    )
    learner = Learner(memory, settings.optimizer, seams)
    limits = settings.server.limits
    return Services(
        memory,
        agent,
        engine,
        hotswap,
        learner,
        environments,
        toolbox,
        limits,
        maintenance=maintenance,
        check_training=lambda: check_training(memory, settings.optimizer, seams),
        server=settings.server,
    )


async def inspect_machine(engine: Engine) -> Machine:
    """Return what the optimizer must know of the hardware: the GPUs, and what the engine takes of them."""
    from optimizer.placement import Gpu, Machine
    from runtime.engine.gpus import find_engine_device, list_gpus

    gpus = await asyncio.to_thread(list_gpus)
    return Machine(
        gpus=[Gpu(gpu.index, gpu.name, gpu.total_bytes, gpu.free_bytes) for gpu in gpus],
        engine_device=find_engine_device(gpus),
        engine_share=engine.config.gpu_memory_utilization if engine.is_ours and gpus else None,
        can_stop_engine=engine.is_ours,
        max_model_len=engine.max_model_len,
        max_loras=engine.config.max_loras,
    )


async def check_training(memory: Memory, config: OptimizerConfig, seams: Seams) -> Check:
    """Say where a cycle would train, or which settings make room for it."""
    from optimizer.errors import TrainingDoesNotFit
    from optimizer.placement import place_training
    from runtime.doctor import Check

    try:
        placement = await place_training(memory, config, seams)
    except TrainingDoesNotFit as error:
        return Check("training", False, str(error), "until then learning is refused; answering is not affected")
    except ValueError as error:  # the base's files are elsewhere: an engine at engine.url need not learn here
        return Check("training", True, f"not here: {error}")
    return Check("training", True, str(placement))


@contextlib.contextmanager
def raising_completion_errors() -> Iterator[None]:
    """Turn what the engine raises into what the optimizer's `Complete` seam may raise."""
    from optimizer.errors import CompletionError, PromptTooLong
    from runtime.errors import BudgetExceeded, EngineError, PolicyError

    try:
        yield
    except BudgetExceeded as error:
        raise PromptTooLong(str(error)) from error
    except (PolicyError, EngineError) as error:
        raise CompletionError(str(error)) from error


async def live(
    services: Services, listener: socket.socket, settings: Any, stop: asyncio.Event, phases: Phases, *, as_json: bool
) -> None:
    """Answer from the first moment (503 while the engine starts) until told to stop; leave no child behind."""
    import uvicorn

    from runtime.api.app import create_app
    from runtime.api.gateway.connections import server_config

    config = server_config(create_app(services), services.limits, timeout_graceful_shutdown=STOP_SECONDS)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # signals are ours: children must be stopped in order
    answering = asyncio.ensure_future(server.serve(sockets=[listener]))
    starting = asyncio.ensure_future(start(services, settings, phases))
    settling = asyncio.ensure_future(freeze_startup_heap(services.memory))
    background: list[asyncio.Future[Any]] = []
    services.memory.answers_at(url_of(listener))
    try:
        if await wait_for_first(stop, starting, answering):
            return
        parts = (services.engine.watch(), services.hotswap.follow(), services.agent.book.tend())
        background += [asyncio.ensure_future(part) for part in parts]
        await services.cycles.resume()
        room = await services.check_training() if services.check_training is not None else None
        if room is not None and not room.is_ok:
            phases.say(f"learning is refused: {room.detail}")
        phases.end()
        announce(services, listener, as_json=as_json)
        await wait_for_first(stop, answering, *background)
    finally:
        phases.say("stopping")
        server.should_exit = True
        server.force_exit = starting.cancelled() or not starting.done()
        await asyncio.wait({answering})
        await cancel_and_wait(starting, settling, *background)
        gc.unfreeze()  # some libraries complain of what is still there at the end
        await services.cycles.stop()
        await services.toolbox.close()
        await services.engine.stop()
        await asyncio.to_thread(services.agent.telemetry.close)


async def freeze_startup_heap(memory: Memory) -> None:
    """Once all is loaded, take it out of the garbage collector's sight.

    Torch and its kin leave a million objects that live as long as the process; looking through them again and again
    stopped every answer, on a busy machine for a second. What is garbage among them stays: to look for it would be such
    a stop, and frees nothing to speak of.
    """
    while not memory.index.has_meanings:
        await asyncio.sleep(1.0)
    gc.freeze()


async def start(services: Services, settings: Any, phases: Phases) -> None:
    """Bring the engine up and put on the active policy: boot is the first swap."""
    from runtime.errors import AdapterError

    memory = services.memory
    await memory.trajectories.close_orphans()
    phases.say("opening tools")
    await services.toolbox.open()
    await services.engine.start()
    await memory.policies.register_base(name_base(services.engine, settings.engine.model))
    while True:
        active = memory.policies.active()
        phases.say(f"putting on policy {active.name}")
        try:
            return await services.hotswap.wear(active.version)
        except AdapterError as refused:
            before = await memory.policies.rollback()
            phases.say(f"policy {active.name} was refused ({refused}); back to {before.name}")


def name_base(engine: Any, model: str | None) -> str:
    """Return what the policies stand on: the hub's id as given, or the directory."""
    if model is not None and not Path(model).expanduser().is_dir():
        return model
    return str(engine.model_path) if engine.model_path is not None else engine.model


def announce(services: Services, listener: socket.socket, *, as_json: bool) -> None:
    """Say where the agent answers, and three things to try."""
    url = url_of(listener)
    policy = services.memory.policies.get(services.hotswap.active_version)
    facts = {"url": url, "policy": policy.name, "base_model": policy.base_model, "data": str(services.memory.data_dir)}
    facts["requires_key"] = services.memory.keys.is_required
    facts["share_live"] = services.memory.config.share_live
    option = "" if url == DEFAULT_URL else f" --url {url}"
    python = os.path.relpath(sys.executable) if sys.executable.startswith(os.getcwd()) else sys.executable
    is_pocket = services.engine.config.model is None and services.engine.config.url is None
    text = render_banner(facts, command=f"{python} serve.py", option=option, is_pocket=is_pocket)
    say(facts, as_json=as_json, show=lambda _: text)


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


async def wait_for_first(stop: asyncio.Event, *tasks: asyncio.Future[Any]) -> bool:
    """Wait until told to stop (True), or until a task ends; raise what ended it."""
    told = asyncio.ensure_future(stop.wait())
    try:
        done, _ = await asyncio.wait({told, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return told in done
    finally:
        told.cancel()


async def cancel_and_wait(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Learner:
    """Turns the loop in the background, one cycle at a time; one that a stop interrupts goes on at the next start."""

    def __init__(self, memory: Memory, config: OptimizerConfig, seams: Seams) -> None:
        self._memory = memory
        self._config = config
        self._seams = seams
        self._running: asyncio.Task[Any] | None = None
        self._judging = asyncio.Lock()  # one at a time: the second must see which tasks the first has used

    async def start(self, settings: dict[str, Any], *, may_loosen_bars: bool = False) -> Cycle:
        """Open a cycle with these departures from the configuration, and set it going.

        Raises:
            CycleInProgress; ValueError for settings that cannot be, for bars of a promotion below the configuration's
            without `may_loosen_bars`, and for too few trajectories.
        """
        from optimizer.cycle.cycle import open_cycle
        from optimizer.errors import OptimizerError
        from optimizer.evaluation.bars import require_proof
        from runtime.settings import overlay

        try:
            config = overlay(self._config, settings, place="settings")
            if not may_loosen_bars:
                require_proof(config, self._config)
            cycle = await open_cycle(self._memory, config, seams=self._seams)
        except OptimizerError as error:
            raise ValueError(str(error)) from error
        self._turn(cycle.id)
        return cycle

    async def check(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what a cycle with these settings needs. Raises: ValueError for settings that cannot be."""
        from optimizer.cycle.readiness import measure_needs
        from runtime.settings import overlay

        config = overlay(self._config, settings, place="settings")
        return [need.to_json() for need in await measure_needs(self._memory, config, self._seams)]

    async def resume(self) -> None:
        """Take up the cycle that an earlier process left open."""
        cycle = self._memory.cycles.unfinished()
        if cycle is not None:
            self._turn(cycle.id)

    async def cancel(self, cycle_id: str) -> Cycle:
        """Stop a cycle for good."""
        from optimizer.cycle.cycle import abandon_cycle

        await self.stop()
        return await abandon_cycle(self._memory, cycle_id, "Cancelled: by request")

    async def judge(self, policy: Policy) -> dict[str, Any]:
        """Settle a cycle's candidate on tasks that have not decided on it yet; return the verdict.

        The bars are the tighter ones of the cycle's settings and of this server's configuration.

        Raises:
            CycleInProgress: held-out tasks would have to be played while a cycle plays.
        """
        from memory.errors import CycleInProgress
        from optimizer.cycle.context import CycleContext
        from optimizer.cycle.release_gate import decide_again
        from optimizer.evaluation.bars import tightest

        shop = CycleContext(self._memory, self._seams, policy.cycle_id)
        bars = tightest(shop.config.evaluation, self._config.evaluation)
        shop.config = shop.config.model_copy(update={"evaluation": bars})
        under_way = self._memory.cycles.unfinished()
        if shop.config.environment and under_way is not None:
            raise CycleInProgress(f"cycle {under_way.id!r} is at {under_way.stage!r}: judge again when it has ended")
        async with self._judging:
            return await decide_again(shop)

    async def stop(self) -> None:
        """Interrupt what runs; its row stays open."""
        if self._running is not None:
            await cancel_and_wait(self._running)

    def _turn(self, cycle_id: str) -> None:
        from optimizer.cycle.cycle import run_cycle

        self._running = asyncio.create_task(run_cycle(self._memory, cycle_id, seams=self._seams))
        # A cycle records its own failure; the exception has been seen.
        self._running.add_done_callback(lambda turn: turn.cancelled() or turn.exception())


@app.command("rebuild-index")
def rebuild_index(
    config: Config = None, data: Data = None, url: Url = DEFAULT_URL, key: Key = None, as_json: Json = False
) -> None:
    """Rebuild what finds memories from the rows; by the running server, or here if none runs."""
    from runtime.cli.client import Client, NoServer

    settings = read_all_settings(config, {"data": data}, [])

    async def work() -> dict[str, Any]:
        with contextlib.suppress(NoServer):
            async with Client(url, key=key) as client:
                return await client.post("/v1/index/rebuild")
        prepare_environment(settings)
        with open_memory_here(settings) as memory:
            return {"counts": await memory.index.rebuild()}

    def show(rebuilt: dict[str, Any]) -> str:
        return "rebuilt: " + ", ".join(f"{count} {name}" for name, count in rebuilt["counts"].items())

    perform(work, as_json=as_json, show=show)


@app.command("copy-rows")
def copy_rows(config: Config = None, data: Data = None, as_json: Json = False) -> None:
    """Copy the rows of the data directory's file into the empty database that memory.database names."""
    settings = read_all_settings(config, {"data": data}, [])

    async def work() -> dict[str, Any]:
        from memory.errors import StoreError
        from memory.store import copy_to_server

        try:
            return {"counts": await asyncio.to_thread(copy_to_server, settings.data, settings.memory)}
        except (StoreError, ValueError) as error:
            raise Failure(str(error)) from error

    def show(copied: dict[str, Any]) -> str:
        return "copied: " + ", ".join(f"{count} {name}" for name, count in copied["counts"].items() if count)

    perform(work, as_json=as_json, show=show)


@app.command(context_settings=OPEN_ENDED)
def doctor(
    context: typer.Context,
    config: Config = None,
    data: Data = None,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Look at everything an answer depends on; with no server running, start an engine to ask it for a real token."""
    from runtime.cli import render as show
    from runtime.cli.client import Client, NoServer

    settings = read_all_settings(config, {"data": data}, context.args)

    async def work() -> dict[str, Any]:
        with contextlib.suppress(NoServer):
            async with Client(url, key=key) as client:
                return await client.get("/v1/doctor")
        prepare_environment(settings)
        phases = show.Phases(watching(as_json), is_silent=as_json)
        try:
            return await examine(settings, phases)
        finally:
            phases.end()

    diagnosis = perform(work, as_json=as_json, show=show.doctor_table)
    if not diagnosis["is_ok"]:
        raise typer.Exit(1)


async def examine(settings: Any, phases: Phases) -> dict[str, Any]:
    """Check everything without a server."""
    from dataclasses import asdict

    from memory.errors import StorageError
    from runtime import doctor as checks
    from runtime.engine.process import Engine
    from runtime.errors import EngineError

    try:
        memory = open_memory_here(settings)
    except Failure as failure:
        if not isinstance(failure.__cause__, StorageError):  # another process has the directory
            raise
        lost = checks.Check("storage", False, str(failure), "the message says what can be done")
        return {"is_ok": False, "checks": [asdict(lost)]}
    with memory:
        phases.say("checking what is kept")
        found = await asyncio.to_thread(checks.check_at_rest, memory)
        engine = Engine(settings.engine, memory.data_dir, on_progress=phases.say)
        try:
            await engine.start()
            found += await checks.check_engine(engine)
        except (EngineError, ValueError, OSError) as error:
            found.append(checks.Check("engine", False, str(error), f"read {engine.log_path}"))
        finally:
            await engine.stop()
    return {"is_ok": all(check.is_ok for check in found), "checks": [asdict(check) for check in found]}


def open_memory_here(settings: Any) -> Memory:
    """Open memory in a verb of its own. Raises Failure when somebody else has it."""
    from memory.errors import StoreError
    from memory.store import Memory
    from runtime.observability.logs import send_logs_to

    try:
        memory = Memory.open(settings.data, settings.memory)
    except StoreError as error:
        raise Failure(str(error)) from error
    send_logs_to(memory.data_dir / "logs" / "ratchet.log")
    return memory


def open_keys_of(config: Path | None, data: str | None) -> AbstractContextManager[Keys]:
    """Return the keys in a data directory, to be opened."""
    from memory.store import open_keys

    settings = read_all_settings(config, {"data": data}, [])
    return open_keys(settings.data, settings.memory)


add_key_verbs(app, open_keys_of)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option("--out", help="Where the model and what it is made from go.")],
    games: Annotated[int, typer.Option("--games", min=1, help="Pretraining games the expert plays.")] = 640,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Tokens to train on.")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    as_json: Json = False,
) -> None:
    """Make a pocket model from scratch: play, train. Started again, it goes on where it stopped."""
    from rich.progress import track

    async def work() -> dict[str, Any]:
        from optimizer.pretraining.train import Recipe, pretrain_in
        from runtime.environments.textworld import TextWorld
        from runtime.environments.textworld_expert import write_transcripts

        transcripts = out / "transcripts.json"
        if not transcripts.exists():
            bar = iter(track(range(games), "compiling games", console=watching(as_json)))
            await write_transcripts(
                TextWorld(out / "games"), transcripts, num_games=games, on_progress=lambda done, total: next(bar, None)
            )
        recipe = Recipe(seed=seed) if tokens is None else Recipe(seed=seed, num_tokens=tokens)
        return await asyncio.to_thread(pretrain_in, out, recipe, console=watching(as_json))

    perform(work, as_json=as_json, show=lambda made: f"{made['num_parameters']} parameters in {made['model']}")


def main() -> None:
    leave(run(app, sys.argv[1:]))


if __name__ == "__main__":
    main()
