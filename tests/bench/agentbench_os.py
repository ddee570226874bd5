"""Whether each operating-system task of AgentBench accepts its authors' own solution and refuses an empty answer.

    python -m tests.bench.agentbench_os AgentBench/data/os_interaction [--limit 40]

No model is involved. A task's example runs in its machine; its output is the answer or, where checks do not begin with
it, the state that it leaves. If a task has an expected answer, that is the solution. The empty answer is given in a
fresh machine. Failing tasks are printed with the reason. If the published scripts are beside the data, the comparing
ones run as well, in a machine, and their verdicts are compared with the grader's.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from runtime.environments.base import Outcome
from runtime.environments.converters.agentbench_os import COMPARING, PublishedTask, digest, read_published
from runtime.environments.converters.published import SkippedTask
from runtime.environments.graders.base import GradingResources, Submission
from runtime.environments.graders.machine import COMPARISONS, Checks, Run
from runtime.environments.graders.text import Exact
from runtime.environments.machines.machine import Machine, MachineSpec, Script
from runtime.environments.task_files.machine import NO_ANSWER, open_machine
from runtime.environments.task_files.rows import TaskRow
from runtime.errors import ToolError, ToolRefused

MAX_MACHINES = 2
VALUES = (
    *(
        "",
        "\n",
        "0",
        "3",
        "3\n",
        " 03",
        "-3",
        "3.0",
        "3_0",
        "30",
        "٣",
        "three",
        "None",
        "3 3",
        "4K",
        "4KB",
        "4.0K",
        "4096",
    ),
    *(
        "4096B",
        "2Byte",
        "1M",
        "1024K",
        "1 G",
        "1024M",
        "K",
        "1T",
        "1P",
        "a\nb",
        "a\r\nb\n",
        "a\rb",
        "b",
        "A",
        "/a/b",
        "9" * 50,
    ),
)


@asynccontextmanager
async def started(row: TaskRow) -> AsyncIterator[Machine]:
    """Yield the machine of a row at the start of its task. Raises: ToolRefused."""
    assert row.machine is not None
    machine = open_machine(row.name, row.machine)
    await machine.start()
    try:
        yield machine
    finally:
        await machine.close()


async def grade(row: TaskRow, answer: str, before: Script | None = None) -> Outcome:
    """Return the outcome of an answer in a fresh machine in which `before` was run. Raises: ToolRefused, ToolError."""
    async with started(row) as machine:
        if before is not None:
            await machine.run_script(before)
        return await row.grader.grade(Submission(answer, machine=machine), GradingResources())


async def grade_reference(row: TaskRow, example: Script | None) -> str | None:
    """Return why the authors' solution is refused, None if it is accepted. Raises: ToolRefused, ToolError."""
    if isinstance(row.grader, Exact):
        outcome = await grade(row, str(row.grader.answer))
    elif isinstance(row.grader, Checks) and example is not None and row.grader.checks[0] == Run(run=example):
        async with started(row) as machine:
            answer = (await machine.run_script(example)).stdout
            outcome = await row.grader.grade(Submission(answer, machine=machine), GradingResources())
        if outcome.value < 1.0:  # in another machine: some examples change what they count
            outcome = await grade(row, answer)
    elif example is not None:
        async with started(row) as machine:
            answer = (await machine.run_script(example)).stdout
        outcome = await grade(row, answer or NO_ANSWER, before=example)
    else:
        return "no solution is published"
    return None if outcome.value == 1.0 else outcome.reason


async def grade_empty(row: TaskRow) -> str | None:
    """Return None if an empty answer is refused, else why not. Raises: ToolRefused, ToolError."""
    outcome = await grade(row, "")
    return None if outcome.value == 0.0 else "an empty answer is accepted"


async def check_task(task: PublishedTask) -> dict[str, str | None]:
    """Return the failures by kind of check; None where nothing failed."""
    row = TaskRow.model_validate(task.content)
    results: dict[str, str | None] = {}
    for name, graded in (("reference", grade_reference(row, task.example)), ("empty", grade_empty(row))):
        try:
            results[name] = await graded
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


async def compare_rules(directory: Path) -> tuple[int, list[str]]:
    """Return how many verdicts of comparing scripts and the grader were compared, and the different ones."""
    scripts = {COMPARING[digest(path)]: path for path in directory.glob("scripts/*/check/*.py")}
    num_verdicts, different = 0, list[str]()
    machine = Machine(MachineSpec())
    await machine.start()
    try:
        for rule, path in scripts.items():
            script = Script(language="python", code=path.read_text(encoding="utf-8"))
            for answer, expected in itertools.product(VALUES, VALUES):
                theirs = (await machine.run_script(script, answer, expected)).status == 0
                num_verdicts += 1
                if COMPARISONS[rule](answer, expected) != theirs:
                    different.append(f"{rule}: {answer!r}, {expected!r}: published {theirs}")
    finally:
        await machine.close()
    return num_verdicts, different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--limit", type=int, help="the first tasks of each split only")
    arguments = parser.parse_args()
    published = list(read_published(arguments.directory))
    left_out = [each for each in published if isinstance(each, SkippedTask)]
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
    num_verdicts, different = asyncio.run(compare_rules(arguments.directory))
    for each in different:
        print(each)
    print(f"{num_verdicts - len(different)} of {num_verdicts} verdicts of comparing scripts agree")


if __name__ == "__main__":
    main()
