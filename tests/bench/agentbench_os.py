"""Whether each operating-system task of AgentBench accepts its authors' own solution and refuses an empty answer.

    python -m tests.bench.agentbench_os AgentBench/data/os_interaction [--limit 40]

Nothing is measured of a model. The example of a task runs in its machine; its output is the answer, or, where checks
do not begin with it, the state that it leaves. Of a task with an expected answer that answer is the solution. The empty
answer is given in a fresh machine. Tasks that fail are printed with the reason.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from pathlib import Path

from runtime.environments.benchmarks.agentbench_os import PublishedTask, read_published
from runtime.environments.benchmarks.published import LeftOut
from runtime.environments.graders.base import GradingResources, Submission
from runtime.environments.task_files.machine import NO_ANSWER, open_machine
from runtime.environments.task_files.rows import TaskRow
from runtime.errors import ToolError, ToolRefused

MAX_MACHINES = 2


async def grade_reference(task: PublishedTask) -> str | None:
    """Return why the authors' solution is refused, None if it is accepted. Raises: ToolRefused, ToolError."""
    row = TaskRow.model_validate(task.content)
    assert row.machine is not None
    machine = open_machine(row.name, row.machine)
    try:
        await machine.start()
        answer = NO_ANSWER
        if row.grader.type == "exact":
            answer = task.content["grader"]["answer"]
        elif task.example is not None:
            finished = await machine.run_script(task.example)
            uses_output = any("compare" in check for check in task.content["grader"]["checks"])
            answer = finished.stdout if uses_output or "argv" in json.dumps(task.content["grader"]) else NO_ANSWER
        outcome = await row.grader.grade(Submission(answer, machine=machine), GradingResources())
        return None if outcome.value == 1.0 else outcome.reason
    finally:
        await machine.close()


async def grade_empty(task: PublishedTask) -> str | None:
    """Return None if an empty answer is refused, else why not. Raises: ToolRefused, ToolError."""
    row = TaskRow.model_validate(task.content)
    assert row.machine is not None
    machine = open_machine(row.name, row.machine)
    try:
        await machine.start()
        outcome = await row.grader.grade(Submission("", machine=machine), GradingResources())
        return None if outcome.value == 0.0 else "an empty answer is accepted"
    finally:
        await machine.close()


async def check_task(task: PublishedTask) -> dict[str, str | None]:
    """Return what failed, by kind of check; None where nothing did."""
    results: dict[str, str | None] = {}
    for name, grade in (("reference", grade_reference), ("empty", grade_empty)):
        try:
            results[name] = await grade(task)
        except (ToolError, ToolRefused) as error:
            results[name] = f"no machine: {error}"
    return results


async def check_all(tasks: list[PublishedTask]) -> dict[str, dict[str, str | None]]:
    """Return the results by the tasks' names."""
    slots = asyncio.Semaphore(MAX_MACHINES)

    async def check(task: PublishedTask) -> tuple[str, dict[str, str | None]]:
        async with slots:
            return task.content["name"], await check_task(task)

    return dict(await asyncio.gather(*map(check, tasks)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--limit", type=int, help="the first tasks of each split only")
    arguments = parser.parse_args()
    published = list(read_published(arguments.directory))
    left_out = [each for each in published if isinstance(each, LeftOut)]
    tasks = [each for each in published if isinstance(each, PublishedTask)]
    taken = Counter[str]()
    chosen = []
    for task in tasks:
        taken[task.content["split"]] += 1
        if arguments.limit is None or taken[task.content["split"]] <= arguments.limit:
            chosen.append(task)
    results = asyncio.run(check_all(chosen))
    for each in left_out:
        print(each.reason)
    for name, failed in results.items():
        for kind, reason in failed.items():
            if reason is not None:
                print(f"{name}, {kind}: {reason}")
    groups = {task.content["name"]: task.content["name"].rpartition("-")[0] for task in chosen}
    for group in dict.fromkeys(groups.values()):
        mine = [results[name] for name, its in groups.items() if its == group]
        accepted, refused = (sum(each[kind] is None for each in mine) for kind in ("reference", "empty"))
        print(f"{group}: {accepted} of {len(mine)} references accepted, {refused} empty answers refused")
    print(f"{len(results)} tasks, {len(left_out)} left out")


if __name__ == "__main__":
    main()
