"""The composition of Ratchet and its command line: the only file that imports memory, runtime and optimizer.

    serve.py serve      opens memory, starts the engine, activates the policy, answers, learns on request
    serve.py ...        the other commands: runtime/cli/; most of them talk to the running server

Hazard: heavy packages are imported inside functions, so that a client command starts without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from optimizer.config import OptimizerConfig
from runtime.cli.commands import add_commands
from runtime.cli.datasets.teach import add_teach_command
from runtime.cli.datasets.verifier import add_verifier_commands
from runtime.cli.keys import add_key_commands
from runtime.cli.local import add_local_commands, refuse_written_password
from runtime.cli.options import OPEN_ENDED, Config, Data, Json
from runtime.cli.output import Failure, exit_process, progress_console, run, run_command
from runtime.cli.server_process import prepare_environment, run_server
from runtime.config import RuntimeSettings
from runtime.settings import BadSettings, overlay, parse_flags, read_settings

if TYPE_CHECKING:
    from memory.schema import Task, Trajectory
    from memory.store import Memory
    from optimizer.placement import Hardware
    from optimizer.seams import Seams
    from runtime.agent.graph import Agent
    from runtime.api.services import Services
    from runtime.cli.render import Phases
    from runtime.doctor import HealthCheck
    from runtime.engine.process import Engine
    from runtime.maintenance import Maintenance
    from runtime.serving.text_completion import TextCompletion

DEFAULT_TOML = Path("ratchet.toml")
DRAIN_SLACK_SECONDS = 30.0
"""Added to the longest episode before the engine is stopped for a training although an episode is still open."""


class Settings(RuntimeSettings):
    """Every setting of the program; README.md and `serve.py serve --help` say how to give one."""

    optimizer: OptimizerConfig = OptimizerConfig()


def read_all_settings(config: Path | None, given: dict[str, str | None], extra: list[str]) -> Settings:
    """Return all settings: flags over environment over TOML over defaults.

    Raises:
        Failure: an unknown key or an invalid value; the message names it and its origin.
    """
    toml = config or (DEFAULT_TOML if DEFAULT_TOML.exists() else None)
    try:
        flags = parse_flags(extra) | {key: value for key, value in given.items() if value is not None}
        # Without the environment: a password may stand there only, since others can read files and command lines.
        refuse_written_password(read_settings(Settings, toml=toml, flags=flags).memory.database)
        return read_settings(Settings, toml=toml, environ=os.environ, flags=flags)
    except BadSettings as bad:
        raise Failure(str(bad), exit_code=2) from None


def compose(settings: Settings, memory: Memory, phases: Phases) -> Services:
    """Make every part of a server and connect them. Nothing runs yet."""
    from optimizer.learner import Learner
    from runtime.agent.graph import Agent
    from runtime.api.services import Services
    from runtime.engine.process import Engine
    from runtime.environments.registry import choose_environment, open_environments
    from runtime.maintenance import Maintenance
    from runtime.observability.telemetry import Telemetry
    from runtime.observability.tracing import open_tracing
    from runtime.serving.critic_endpoint import open_critic
    from runtime.serving.hotswap import HotSwap
    from runtime.serving.text_completion import ServedBase, TextCompletion
    from runtime.tools.toolbox import Toolbox

    made_for = memory.policies.find_base_model()
    engine = Engine(settings.engine, memory.data_dir, made_for=made_for, on_progress=phases.begin)
    # It takes `engine.on_restart`: one engine has one HotSwap.
    hotswap = HotSwap(memory.policies, engine, max_lora_rank=settings.engine.max_lora_rank)
    model = open_critic(settings.critic, os.environ) or (ServedBase(hotswap) if engine.can_be_critic else None)
    critic = ModelCritic(TextCompletion(model)) if model is not None else None
    complete = critic.complete if critic is not None else None
    environments = open_environments(settings.environments, memory.data_dir / "environments", complete)
    toolbox = Toolbox(settings.tools, memory.retrieval.find_passages, memory.data_dir / "logs")
    agent = Agent(
        memory,
        hotswap,
        environments,
        settings.agent,
        tools=toolbox.tools,  # the list itself: `Toolbox.open` fills it later
        telemetry=Telemetry(open_tracing(os.environ)),
        serve_with_memory=settings.optimizer.evaluation.serve_with_memory,
    )
    drain_seconds = settings.agent.max_seconds + DRAIN_SLACK_SECONDS
    maintenance = Maintenance(engine, hotswap, agent.open_episodes, drain_seconds=drain_seconds)
    seams = make_seams(agent, engine, maintenance, critic)
    environment = choose_environment(environments, engine.made_to_play)
    learner = Learner(memory, settings.optimizer, seams, overlay=overlay, environment=environment)
    return Services(
        memory,
        agent,
        engine,
        hotswap,
        learner,
        environments,
        toolbox,
        settings.server.limits,
        maintenance=maintenance,
        check_training=lambda: check_training(memory, settings.optimizer, seams),
        server=settings.server,
    )


def make_seams(agent: Agent, engine: Engine, maintenance: Maintenance, critic: ModelCritic | None) -> Seams:
    """Return the functions through which the optimizer reaches the runtime, which it may not import."""
    from optimizer.seams import Seams, Serving, unknown_context
    from runtime.agent.turn import TurnRequest

    async def rollout(task: Task, **how: Any) -> Trajectory:
        return (await agent.rollout(TurnRequest(task=task, **how))).trajectory

    def serving(name: str) -> Serving:
        return Serving(agent.temperature_of(agent.environment(name) if name else None), agent.serve_with_memory)

    async def prepare(tasks: Sequence[Task], on_progress: Callable[[int, int], None] | None = None) -> None:
        await agent.environment(tasks[0].environment or "").prepare(tasks, on_progress)

    return Seams(
        rollout=rollout,
        branching=lambda environment: agent.branch if agent.environment(environment).can_replay else None,
        sealed_tasks=lambda environment, num_tasks: agent.environment(environment).sealed_tasks(num_tasks),
        holds_out=lambda environment, task, texts: agent.environment(environment).holds_out(task, texts),
        find_tasks=lambda environment, task, texts: agent.environment(environment).find_tasks(task, texts),
        serving=serving,
        tasks=lambda environment, split, num_tasks, offset=0: agent.environment(environment).tasks(
            split, num_tasks, offset=offset
        ),
        prepare=prepare,
        complete=critic.complete if critic is not None else None,
        context_tokens=critic.context_tokens if critic is not None else unknown_context,
        # At each call: `max_model_len` is unknown before the engine's start.
        inspect_hardware=lambda: inspect_hardware(engine),
        open_window=maintenance.window,
    )


async def inspect_hardware(engine: Engine) -> Hardware:
    """Return the hardware as the optimizer reads it: the GPUs, and the part of them that the engine takes."""
    from optimizer.placement import Gpu, Hardware
    from runtime.engine.gpus import find_engine_device, list_gpus

    gpus = await asyncio.to_thread(list_gpus)
    return Hardware(
        gpus=[Gpu(gpu.index, gpu.name, gpu.total_bytes, gpu.free_bytes) for gpu in gpus],
        engine_device=find_engine_device(gpus),
        # An external engine may be on another machine: its share of the GPUs here is unknown.
        engine_share=engine.config.gpu_memory_utilization if engine.is_ours and gpus else None,
        can_stop_engine=engine.is_ours,
        max_model_len=engine.max_model_len,
        max_loras=engine.config.max_loras,
    )


async def check_training(memory: Memory, config: OptimizerConfig, seams: Seams) -> HealthCheck:
    """Return a check that names the device of a training, or the settings that free capacity for one."""
    from optimizer.errors import TrainingDoesNotFit
    from optimizer.placement import find_placement
    from runtime.doctor import HealthCheck

    try:
        placement = await find_placement(memory, config, seams.inspect_hardware)
    except TrainingDoesNotFit as error:
        return HealthCheck("training", False, str(error), "until then learning is refused; answering is not affected")
    except ValueError as error:  # the base's files are elsewhere: an engine at engine.url need not learn here
        return HealthCheck("training", True, f"not here: {error}")
    return HealthCheck("training", True, str(placement))


async def verify(settings: RuntimeSettings, memory: Memory, names: Sequence[str], **options: Any) -> dict[str, Any]:
    """Train a verifier, or have the newest one grade: see `run_verifier`."""
    from optimizer.errors import OptimizerError
    from optimizer.verifier.verifier import run_verifier

    assert isinstance(settings, Settings)
    try:
        return await run_verifier(memory, settings.optimizer, names, **options)
    except (OptimizerError, ValueError) as error:
        raise Failure(str(error)) from error


class ModelCritic:
    """A model as the optimizer's critic."""

    def __init__(self, completion: TextCompletion) -> None:
        self._completion = completion

    async def complete(self, messages: list[dict[str, Any]], *, schema: dict[str, Any], max_tokens: int) -> str:
        """Return the model's answer, JSON of `schema`. Raises PromptTooLong or CompletionError."""
        with self._errors_of_the_optimizer():
            return await self._completion.complete(messages, schema=schema, max_tokens=max_tokens)

    async def context_tokens(self) -> int | None:
        """Return how many tokens a prompt and its answer may have together; None if the engine does not say."""
        with self._errors_of_the_optimizer():
            return await self._completion.context_tokens()

    @contextlib.contextmanager
    def _errors_of_the_optimizer(self) -> Iterator[None]:
        from optimizer.errors import CompletionError, PromptTooLong
        from runtime.errors import BudgetExceeded, EngineError, PolicyError

        try:
            yield
        except BudgetExceeded as error:
            raise PromptTooLong(str(error)) from error
        except (PolicyError, EngineError) as error:  # not their text, which can quote a prompt
            raise CompletionError(getattr(error, "message", type(error).__name__)) from error


app = typer.Typer(
    help="An agent that answers, remembers, learns, proves that it learned, and only then swaps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
add_commands(app)
add_local_commands(app, read_all_settings)
add_key_commands(app, read_all_settings)
add_teach_command(app, read_all_settings)
add_verifier_commands(app, read_all_settings, verify)


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
            runner.run(run_server(settings, partial(compose, settings), phases, as_json=as_json))
    finally:
        phases.end()


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option("--out", help="Where the model and what it is made from go.")],
    games: Annotated[int, typer.Option("--games", min=1, help="Pretraining games the expert plays.")] = 640,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Tokens to train on.")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    as_json: Json = False,
) -> None:
    """Make a pocket model from scratch: play, train. Started again, it goes on where it stopped."""

    async def work() -> dict[str, Any]:
        from optimizer.pretraining.train import Recipe, pretrain_in
        from runtime.cli.play import play_transcripts

        console = progress_console(as_json)
        await play_transcripts(out, num_games=games, console=console)
        recipe = Recipe(seed=seed) if tokens is None else Recipe(seed=seed, num_tokens=tokens)
        return await asyncio.to_thread(pretrain_in, out, recipe, console=console)

    run_command(work, as_json=as_json, render=lambda made: f"{made['num_parameters']} parameters in {made['model']}")


def main() -> None:
    exit_process(run(app, sys.argv[1:]))


if __name__ == "__main__":
    main()
