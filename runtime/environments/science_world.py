"""ScienceWorld (arXiv 2203.07540): thirty kinds of experiments of primary school, in text.

A task is a kind and a variation, `boil-3`. The published training set is practice, the development set is held out, the
test set is sealed: ETO (arXiv 2403.02502) measures on both. The reward is the game's score; a fatal mistake gives 0.
Needs the extra `scienceworld` and Java; an episode takes up to a hundred commands, so raise `agent.max_steps`.
Invariant: a started task has a simulator of its own; one that hangs or breaks is killed and replaced.
Hazard: each simulator is a Java process with about 1 GB of memory; it ends with the server, because its standard input
does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from memory.schema import Split, Task
from runtime.engine.client import Message
from runtime.environments.base import Environment, Outcome, Playthrough
from runtime.errors import EnvironmentRefused, ToolError, UnknownTask
from runtime.tools.base import Tool

LOAD_SECONDS = 120.0
STEP_SECONDS = 20.0
KILL_SECONDS = 5.0
SYSTEM_PROMPT = (
    "You do experiments in a text world. Call act with one short command at a time, for example: look around, "
    "open door to kitchen, go to kitchen, pick up thermometer, focus on water, use thermometer on water, "
    "activate stove, move pot to stove, wait1, inventory, task."
)
ACT = {
    "type": "object",
    "properties": {"command": {"type": "string"}},
    "required": ["command"],
}


class ScienceWorld(Environment):
    """All experiments, or those named in `kinds`; `num_worlds` of them may be played at the same time."""

    name = "scienceworld"
    system_prompt = SYSTEM_PROMPT
    temperature = 0.0

    def __init__(
        self, kinds: Sequence[str] | None = None, *, num_worlds: int = 2, simplifications: str = "easy"
    ) -> None:
        """Start the first simulator and list its tasks; takes some ten seconds.

        Raises:
            EnvironmentRefused: the extra or Java is not installed, or a kind does not exist.
        """
        if num_worlds < 1:
            raise EnvironmentRefused(f"num_worlds must be at least 1, not {num_worlds!r}")
        self._simplifications = simplifications
        first = Simulator()
        self._variations = _list_variations(first, kinds)
        # None stands for a simulator that is started when its turn comes.
        self._free: list[Simulator | None] = [first, *[None] * (num_worlds - 1)]
        self._slots: asyncio.Semaphore | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def task(self, name: str) -> Task:
        kind, _, number = name.rpartition("-")
        for split, variations in self._variations.get(kind, {}).items():
            if number.isdecimal() and str(int(number)) == number and int(number) in variations:
                side = Split.PRACTICE if split == "train" else Split.HELD_OUT
                return Task(environment=self.name, name=name, kind=kind, split=side)
        raise UnknownTask(f"{self.name} has no task {name!r}: a task is a kind and a variation, such as 'boil-3'")

    def tasks(self, split: Split, num_tasks: int, *, offset: int = 0) -> list[Task]:
        if split not in (Split.PRACTICE, Split.HELD_OUT):
            raise ValueError(f"{self.name} has no split {split.value!r}: use practice or held-out")
        return self._list_tasks("train" if split is Split.PRACTICE else "dev", num_tasks, offset)

    def sealed_tasks(self, num_tasks: int) -> list[Task]:
        return self._list_tasks("test", num_tasks, 0)

    def is_sealed(self, name: str) -> bool:
        kind, _, number = name.rpartition("-")
        return kind in self._variations and int(number) in self._variations[kind]["test"]

    def _list_tasks(self, split: str, num_tasks: int, offset: int) -> list[Task]:
        # The first variation of each kind, then the second of each: every block holds all kinds.
        ranked = [
            (rank, kind, number)
            for kind, variations in self._variations.items()
            for rank, number in enumerate(variations[split])
        ]
        return [self.task(f"{kind}-{number}") for _, kind, number in sorted(ranked)[offset : offset + num_tasks]]

    async def start(self, task: Task) -> Experiment:
        simulator = await self._take()
        try:
            return await self._load(task, simulator)
        except BaseException:  # also a cancellation: the simulator may still be loading
            self._give_back(simulator, is_broken=True)
            raise

    async def demonstrate(self, task: Task) -> list[Message] | None:
        """Return the messages of the game's own solution of a practice task, which may take a hundred commands."""
        if task.split is not Split.PRACTICE:
            return None
        playthrough = await self.start(task)
        try:
            commands = await playthrough.list_gold_commands()
            return [*playthrough.opening, *await playthrough.play_all(commands)]
        finally:
            await playthrough.close()

    async def _take(self) -> Simulator:
        loop = asyncio.get_running_loop()
        # A semaphore belongs to one event loop; commands and tests run several after another.
        if self._slots is None or self._loop is not loop:
            self._slots, self._loop = asyncio.Semaphore(len(self._free)), loop
        await self._slots.acquire()
        free = self._free.pop()
        if free is not None:
            return free
        try:
            return await asyncio.to_thread(Simulator)
        except BaseException:
            self._free.append(None)
            self._slots.release()
            raise

    def _give_back(self, simulator: Simulator, *, is_broken: bool) -> None:
        if is_broken:
            simulator.kill()
        # At the end, where `_take` pops: a simulator that runs is used before another one is started.
        self._free.insert(0 if is_broken else len(self._free), None if is_broken else simulator)
        assert self._slots is not None
        self._slots.release()

    async def _load(self, task: Task, simulator: Simulator) -> Experiment:
        kind, _, number = task.name.rpartition("-")

        def load() -> tuple[str, str]:
            simulator.env.load(kind, int(number), self._simplifications, generateGoldPath=True)
            observation, _ = simulator.env.reset()
            return simulator.env.get_task_description(), observation

        description, observation = await simulator.run(load, seconds=LOAD_SECONDS)
        return Experiment(task, f"{description}\n{observation}", simulator, self._give_back)


class Simulator:
    """One Java process, and the only thread that talks to it."""

    def __init__(self) -> None:
        try:
            from scienceworld import ScienceWorldEnv  # pyright: ignore[reportMissingImports]  # the extra
        except ImportError as error:
            raise EnvironmentRefused(f"scienceworld needs its package: pip install scienceworld ({error})") from None
        try:
            self.env: Any = ScienceWorldEnv("")
        except OSError as error:
            raise EnvironmentRefused(f"scienceworld needs Java, and no 'java' starts here: {error}") from None
        # It logs each lost connection with a traceback, also those of a process that was killed on purpose.
        logging.getLogger("py4j").setLevel(logging.CRITICAL)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scienceworld")

    async def run(self, function: Callable[[], Any], *, seconds: float) -> Any:
        """Call a function on the simulator's thread. Raises: TimeoutError, and whatever the simulator raises."""
        async with asyncio.timeout(seconds):
            return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def kill(self) -> None:
        """End the process; a call that hangs in it fails then."""
        process = self.env._gateway.java_process
        process.kill()
        # The package's own `close`, which its destructor calls, writes to the process unless it was waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)
        self._thread.shutdown(wait=False)


class Experiment(Playthrough):
    """One started task."""

    def __init__(self, task: Task, task_text: str, simulator: Simulator, give_back: Callable[..., None]) -> None:
        self.task = task
        self.task_text = task_text
        self.tools = [Tool("act", "Give the world one command.", ACT, self._act, timeout_seconds=STEP_SECONDS + 5.0)]
        self._simulator = simulator
        self._give_back = give_back
        self._is_broken = False
        self._score = 0.0

    async def _act(self, arguments: dict[str, Any]) -> str:
        command, server = arguments["command"], self._simulator.env.server

        # Not the package's own `step`, which also lists all valid commands: seconds in a large world.
        def step() -> tuple[str, float, bool]:
            return server.step(command), float(server.getScore()), bool(server.getCompleted())

        try:
            observation, self._score, is_completed = await self._simulator.run(step, seconds=STEP_SECONDS)
        except Exception as error:  # py4j has many, and all of them mean a simulator that cannot be used again
            self._is_broken = self.is_done = True
            raise ToolError(f"the world broke: {type(error).__name__}") from error
        # A negative score is a fatal mistake, such as focusing on the wrong thing.
        if is_completed or self._score < 0:
            self.is_done, self.closing_text = True, observation
        return observation

    async def list_gold_commands(self) -> list[str]:
        """Return commands that solve the task, from its beginning."""
        return await self._simulator.run(self._simulator.env.get_gold_action_sequence, seconds=LOAD_SECONDS)

    async def play_all(self, commands: Sequence[str]) -> list[Message]:
        """Execute commands until the task is done; return the messages of a policy that calls them."""
        messages: list[Message] = []
        for number, command in enumerate(commands):
            arguments = {"command": command}
            function = {"name": "act", "arguments": json.dumps(arguments)}
            call = {"id": f"call-{number}", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": await self._act(arguments)})
            if self.is_done:
                break
        return messages

    async def close(self) -> Outcome:
        self._give_back(self._simulator, is_broken=self._is_broken)
        if self._is_broken:
            raise ToolError("the simulator broke, so the episode has no score")
        return Outcome(min(max(self._score, 0.0), 1.0), f"score {100 * self._score:.0f} of 100")


def _list_variations(simulator: Simulator, kinds: Sequence[str] | None) -> dict[str, dict[str, Sequence[int]]]:
    """Return the variations of each kind by set: train, dev, test."""
    env, known = simulator.env, simulator.env.get_task_names()
    if unknown := sorted(set(kinds or ()) - set(known)):
        simulator.kill()
        raise EnvironmentRefused(f"scienceworld has no kind {unknown[0]!r}; there is: {', '.join(known)}")
    variations = {}
    for kind in kinds or known:
        env.load(kind, 0, "", generateGoldPath=False)
        sets = {"train": env.get_variations_train, "dev": env.get_variations_dev, "test": env.get_variations_test}
        variations[kind] = {name: read() for name, read in sets.items()}
    return variations
