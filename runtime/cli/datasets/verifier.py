"""The commands `verifier train` and `verifier grade`: a model that is trained on graded episodes grades the others.

They open the data directory themselves, so the server must be stopped. The work is the optimizer's, which serve.py
passes in.
Hazard: nothing heavy may be imported at module level.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from runtime.cli.local import open_memory_here
from runtime.cli.options import OPEN_ENDED, Config, Data, Json, ReadSettings
from runtime.cli.output import Failure, progress_console, run_command
from runtime.cli.server_process import prepare_environment

if TYPE_CHECKING:
    from memory.store import Memory
    from runtime.config import RuntimeSettings

OnStep = Callable[[dict[str, Any]], Awaitable[None]]
Environment = Annotated[
    list[str] | None,
    typer.Option(help="Whose episodes; more than once for several. By default those that the optimizer learns from."),
]
Logged = Annotated[bool, typer.Option("--logged", help="Live traffic instead of an environment.")]


class VerifierWork(Protocol):
    async def __call__(
        self,
        settings: RuntimeSettings,
        memory: Memory,
        environments: Sequence[str],
        /,
        *,
        limit: int | None,
        on_step: OnStep,
    ) -> dict[str, Any]:
        """Train a verifier, or with a `limit` have the newest one grade so many episodes. Without `environments`, of
        those of the configuration. Raises ValueError, or an error of the optimizer's."""
        ...


def add_verifier_commands(app: typer.Typer, read_settings: ReadSettings, verify: VerifierWork) -> None:
    """Add the commands to the command line."""
    verifier = typer.Typer(help="A model that grades episodes that nobody graded.", no_args_is_help=True)
    app.add_typer(verifier, name="verifier")

    @verifier.command(context_settings=OPEN_ENDED)
    def train(
        context: typer.Context,
        environment: Environment = None,
        logged: Logged = False,
        config: Config = None,
        data: Data = None,
        as_json: Json = False,
    ) -> None:
        """Train a verifier on graded episodes, and print how well it grades tasks that it has not seen."""
        settings = read_settings(config, {"data": data}, context.args)
        environments = choose_environments(environment, logged)
        _run(settings, verify, environments, None, as_json, lambda report: report["description"])

    @verifier.command(context_settings=OPEN_ENDED)
    def grade(
        context: typer.Context,
        environment: Environment = None,
        logged: Logged = False,
        limit: Annotated[int, typer.Option(min=1, help="Episodes, the newest ones.")] = 1_000,
        config: Config = None,
        data: Data = None,
        as_json: Json = False,
    ) -> None:
        """Grade episodes without a reward with the newest verifier; the grades count for training data alone."""
        settings = read_settings(config, {"data": data}, context.args)
        _run(settings, verify, choose_environments(environment, logged), limit, as_json, _describe_grading)


def choose_environments(environment: list[str] | None, logged: bool) -> list[str]:
    """Return the environments that were asked for; `""` is live traffic. Raises: Failure."""
    if environment and logged:
        raise Failure("give either --environment or --logged: live traffic has no environment", exit_code=2)
    return [""] if logged else environment or []


def _run(
    settings: RuntimeSettings,
    verify: VerifierWork,
    environments: Sequence[str],
    limit: int | None,
    as_json: bool,
    render: Callable[[dict[str, Any]], str],
) -> None:
    async def work() -> dict[str, Any]:
        from runtime.cli.datasets.progress import make_progress

        prepare_environment(settings)
        with open_memory_here(settings) as memory, make_progress(progress_console(as_json)) as progress:
            bar = progress.add_task("the verifier", total=None)

            async def on_step(step: dict[str, Any]) -> None:
                progress.update(bar, completed=step["step"], total=step["total"])

            return await verify(settings, memory, environments, limit=limit, on_step=on_step)

    run_command(work, as_json=as_json, render=render)


def _describe_grading(graded: dict[str, Any]) -> str:
    left_out = ", ".join(f"{count} {reason}" for reason, count in graded["left_out"].items())
    return (
        f"verifier v{graded['version']} found {graded['num_good']} episodes good and {graded['num_bad']} bad"
        f"{f'; left out: {left_out}' if left_out else ''}"
    )
