"""The command `teach`: a model behind an endpoint plays practice tasks here, and its successes are imported.

The environment is opened in this process, from the same configuration as the server's; the server lists the tasks and
keeps the demonstrations. Invariant: the endpoint's key is read from its environment variable, and neither printed nor
sent to the server.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runtime.cli.options import DEFAULT_URL, OPEN_ENDED, Config, Json, Key, ReadSettings, Url, connect
from runtime.cli.output import BAD_USAGE, Failure, progress_console, run_command
from runtime.settings import BadSettings, read_key

if TYPE_CHECKING:
    from memory.schema import Task
    from runtime.cli.client import Client
    from runtime.config import RuntimeSettings, TeacherConfig
    from runtime.environments.base import Environment
    from runtime.serving.chat_endpoint import ChatEndpoint
    from runtime.teacher.teaching import TaughtEpisode, TeachingCounts

SOURCE_PREFIX = "teacher:"
"""Demonstrations have the source `teacher:<model>`."""
PAGE_ROWS = 500


def add_teach_command(app: typer.Typer, read_settings: ReadSettings) -> None:
    """Add the command to the command line."""

    @app.command("teach", context_settings=OPEN_ENDED)
    def teach_tasks(
        context: typer.Context,
        environment: Annotated[str, typer.Option(help="The environment.")],
        tasks: Annotated[int, typer.Option(min=1, help="Practice tasks, the first ones.")] = 64,
        concurrency: Annotated[int, typer.Option(min=1, help="Concurrent episodes.")] = 4,
        config: Config = None,
        url: Url = DEFAULT_URL,
        key: Key = None,
        as_json: Json = False,
    ) -> None:
        """Have the model of the section `teacher` play practice tasks; what it solves is learned by the next cycle.

        Tasks that a teacher has solved before are skipped, so a run that broke off is simply started again.
        """
        settings = read_settings(config, {}, context.args)
        api_key = read_api_key(settings.teacher, os.environ)

        async def work() -> dict[str, Any]:
            async with connect(url, key) as client:
                return await _teach_first_tasks(client, settings, environment, tasks, concurrency, api_key, as_json)

        taught = run_command(work, as_json=as_json, render=_render)
        if taught["has_teacher_failed"] or taught["is_environment_refused"]:
            raise typer.Exit(1)


def read_api_key(config: TeacherConfig, environ: Mapping[str, str]) -> str | None:
    """Return the endpoint's key; None where it needs none.

    Raises:
        Failure: no teacher is configured, or the variable with its key is missing.
    """
    if config.url is None or config.model is None:
        missing = "teacher.url" if config.url is None else "teacher.model"
        raise Failure(f"{missing} is not set: name the teacher's endpoint and model in [teacher]", exit_code=BAD_USAGE)
    try:
        return read_key("teacher.api_key", config.api_key, environ)
    except BadSettings as error:
        raise Failure(str(error), exit_code=BAD_USAGE) from None


async def _teach_first_tasks(
    client: Client,
    settings: RuntimeSettings,
    environment_name: str,
    num_tasks: int,
    concurrency: int,
    api_key: str | None,
    as_json: bool,
) -> dict[str, Any]:
    from runtime.cli.play import PlayRequest, list_tasks
    from runtime.environments.base import find_environment
    from runtime.environments.registry import open_environments
    from runtime.serving.chat_endpoint import ChatEndpoint
    from runtime.serving.critic_endpoint import open_critic
    from runtime.serving.text_completion import TextCompletion
    from runtime.teacher.budget import TeacherBudget

    config = settings.teacher
    request = PlayRequest(environment=environment_name, num_tasks=num_tasks, split="practice")
    names = await list_tasks(client, request)
    known = await list_taught_tasks(client, environment_name)
    budget = TeacherBudget(
        max_tokens=config.max_tokens,
        max_cost=config.max_cost,
        prompt_price=config.prompt_price,
        output_price=config.output_price,
    )
    # Only this environment, and in a directory of its own: the data directory belongs to the server.
    with tempfile.TemporaryDirectory() as directory:
        configured = settings.environments
        chosen = {environment_name: configured[environment_name]} if environment_name in configured else {}
        critic = open_critic(settings.critic, os.environ)
        complete = TextCompletion(critic).complete if critic is not None else None
        environment = find_environment(open_environments(chosen, Path(directory), complete), environment_name)
        tasks = [environment.task(name) for name in dict.fromkeys(names) if name not in known]
        saver = _Saver(client, environment_name, f"{SOURCE_PREFIX}{config.model}")
        teacher = ChatEndpoint("teacher", config, api_key=api_key, budget=budget)
        counts = await _teach(environment, tasks, teacher, settings, saver, concurrency, as_json)
    return {
        "object": "teaching",
        "environment": environment_name,
        "teacher": config.model,
        **vars(counts),
        "num_skipped": len(set(names) & known),
        "num_added": saver.num_added,
        "teaches": saver.teaches,
        **budget.to_json(),
    }


async def _teach(
    environment: Environment,
    tasks: list[Task],
    teacher: ChatEndpoint,
    settings: RuntimeSettings,
    saver: _Saver,
    concurrency: int,
    as_json: bool,
) -> TeachingCounts:
    from runtime.cli.datasets.progress import make_progress
    from runtime.teacher.teaching import TeachingLimits, teach

    ordinary, most = environment.max_output_tokens, settings.agent.max_output_tokens
    limits = TeachingLimits(
        max_steps=settings.agent.max_steps,
        max_seconds=settings.agent.max_seconds,
        max_output_tokens=ordinary if most is None else min(ordinary, most),
        success_reward=settings.memory.success_reward,
    )
    with make_progress(progress_console(as_json)) as progress:
        bar = progress.add_task("the teacher plays", total=len(tasks))

        def on_taught(counts: TeachingCounts) -> None:
            num_done = counts.num_solved + counts.num_unsolved + counts.num_failed + counts.num_unplayed
            progress.update(bar, completed=num_done, description=f"the teacher plays, {counts.num_solved} solved")

        return await teach(
            environment, tasks, teacher, limits, save=saver.save, concurrency=concurrency, on_taught=on_taught
        )


class _Saver:
    """Imports each demonstration as soon as it is there."""

    def __init__(self, client: Client, environment: str, source: str) -> None:
        self._client = client
        self._query = {"format": "ratchet", "environment": environment, "source": source}
        self.num_added = 0
        self.teaches: bool | None = None
        """Whether weights learn from what was saved; None before the first."""

    async def save(self, episode: TaughtEpisode) -> None:
        from memory.formats.files import dump_line

        line = dump_line(episode.to_row())
        added = await self._client.post_lines("/v1/examples", line, is_trusted=episode.is_trusted, **self._query)
        self.num_added += added["num_added"]
        self.teaches = added["teaches"] or bool(self.teaches)


async def list_taught_tasks(client: Client, environment: str) -> set[str]:
    """Return the names of the tasks that have a demonstration of any teacher."""
    counts = await client.get("/v1/examples/counts")
    sources = {
        row["source"]
        for row in counts["data"]
        if row["environment"] == environment and row["source"].startswith(SOURCE_PREFIX)
    }
    names: set[str] = set()
    for source in sources:
        before: str | None = None
        while True:
            query = {"environment": environment, "source": source, "before": before}
            page = await client.get("/v1/examples", limit=PAGE_ROWS, kind="demonstration", **query)
            names.update(row["task"] for row in page["data"] if row["task"] is not None)
            before = page["next_before"]
            if before is None:
                break
    return names


def _render(taught: dict[str, Any]) -> str:
    played = taught["num_solved"] + taught["num_unsolved"] + taught["num_failed"]
    lines = [
        f"{taught['teacher']} solved {taught['num_solved']} of {played} tasks played ({taught['num_failed']} of them "
        f"failed); {taught['num_skipped']} were solved before, {taught['num_unplayed']} are left",
        f"{taught['tokens_spent']} tokens in {taught['num_calls']} calls, {taught['tokens_left']} left of the budget",
    ]
    if taught["cost_spent"] is not None:
        left = "" if taught["cost_left"] is None else f", {taught['cost_left']:.4f} left of the budget"
        lines.append(f"cost {taught['cost_spent']:.4f}{left}")
    lines += [f"failed: {failure}" for failure in taught["failures"]]
    if unnamed := taught["num_failed"] - len(taught["failures"]):
        lines.append(f"failed: {unnamed} more")
    if taught["stopped_by"] is not None:
        lines.append(f"stopped: {taught['stopped_by']}")
    if taught["teaches"] is False:
        lines.append("Weights do not learn from these rows: the key may not teach, or they are untrusted.")
    return "\n".join(lines)
