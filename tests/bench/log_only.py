"""Whether an app improves that knows of the server only by its `base_url`, measured with the real engine.

    python -m tests.bench.log_only [--games DIR] [--json FILE]

The app is docs/examples/textworld_app.py: LangGraph with its own tools. This module is its author, who knows what the
app does not: which games are practice and which are held out, and how each ended. Flow: start a server -> play the
held-out games with an empty memory -> (practise, give feedback, `serve.py learn --logged`) twice -> play the held-out
games with both policies, marked as held out -> `serve.py judge`. The server never plays.

There are two cycles because the wins in the first log are mostly luck. The first cycle is run for its insights, which
make the second log better; its candidate, trained briefly, is not measured.

TextWorld's games are compiled first, a second or two each; `--games` keeps them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import httpx
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI

from memory.schema import Split
from memory.statistics import wilson_interval
from optimizer.evaluation.intervals import compare_paired
from runtime.environments.textworld import TextWorld
from tests.bench.measure import make_parser, print_table, write_json
from tests.bench.server import ROOT, OurServer, end_in_order

APP = ROOT / "docs" / "examples" / "textworld_app.py"
LEARN_SECONDS = 1500
SHARED = {"share": "true"}  # games hold no personal text, so their memory is shared by all users
FOR_WORDS = ("--set", "recipe.sft_epochs=1", "--set", "preferences.min_rows=1000", "--set", "demonstrations.min_rows=8")


@dataclass
class Tried:
    """One round of games by one policy, with the outcome of each."""

    name: str
    won: dict[str, bool]
    num_failed: int
    seconds: float

    def row(self) -> dict[str, Any]:
        num_won = sum(self.won.values())
        low, high = wilson_interval(num_won, len(self.won))
        return {
            "round": self.name,
            "num_games": len(self.won),
            "num_won": num_won,
            "success": num_won / max(1, len(self.won)),
            "low": low,
            "high": high,
            "num_failed": self.num_failed,
            "seconds": round(self.seconds, 1),
        }


class Author:
    """The author of the app: runs it, and posts the outcome of each game as feedback."""

    def __init__(self, url: str, games: Path, concurrency: int) -> None:
        self._app = load_app()
        self._url = url
        self._games = games
        self._places = asyncio.Semaphore(concurrency)
        self._http = httpx.AsyncClient(base_url=url, timeout=60, trust_env=False)

    async def practise(self, name: str, seeds: Sequence[int]) -> Tried:
        """Play with requests as the app would send them to OpenAI, but for the metadata that shares their memory."""
        by_seed = {seed: {"metadata": SHARED} for seed in seeds}
        return await self._play_all(name, seeds, by_seed, model="agent", temperature=1.0)

    async def measure(self, name: str, seeds: Sequence[int], policy: str) -> Tried:
        """Play greedily with one policy; each game is a named held-out task, from which nothing is learned."""
        by_seed = {seed: {"metadata": {**SHARED, "task": str(seed), "split": "held-out"}} for seed in seeds}
        return await self._play_all(name, seeds, by_seed, model=f"agent@{policy}", temperature=0.0)

    async def _play_all(self, name: str, seeds: Sequence[int], extra: dict[int, Any], **how: Any) -> Tried:
        started = time.monotonic()
        model = ChatOpenAI(base_url=f"{self._url}/v1", api_key="none", timeout=300, **how)
        models = [model.model_copy(update={"extra_body": extra.get(seed)}) for seed in seeds]
        won = await asyncio.gather(*(self._play(*each) for each in zip(seeds, models, strict=True)))
        ended = {str(seed): bool(it) for seed, it in zip(seeds, won, strict=True)}
        tried = Tried(name, ended, sum(it is None for it in won), time.monotonic() - started)
        print(f"  {name}: {sum(ended.values())} of {len(ended)} won, {tried.seconds:.0f} s", flush=True)
        return tried

    async def _play(self, seed: int, model: ChatOpenAI) -> bool | None:
        """Return whether the game was won; None if it failed."""
        async with self._places:
            try:
                ended = await self._app.play(self._games / f"cooking-{seed}.z8", model)
            except Exception as error:  # one failed game does not end the run; it is counted
                print(f"  game {seed} broke off: {type(error).__name__}: {error}", flush=True)
                return None
        last = [message for message in ended.messages if isinstance(message, AIMessage)][-1]
        answer = last.response_metadata["id"]
        for path, body in (
            ("/v1/feedback", {"target": answer, "value": ended.is_won}),
            (f"/v1/trajectories/{answer}/close", None),
        ):
            (await self._http.post(path, json=body)).raise_for_status()
        return ended.is_won

    async def close(self) -> None:
        await self._http.aclose()


def load_app() -> Any:
    """Import the app by its path: it belongs to no package."""
    spec = spec_from_file_location(APP.stem, APP)
    module = sys.modules[APP.stem] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(url: str, *verb: str) -> dict[str, Any]:
    """Run a command of `serve.py` and return its JSON output."""
    command = [sys.executable, "serve.py", *verb, "--url", url, "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=LEARN_SECONDS)
    said = json.loads(done.stdout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(verb)}: {said}")
    return said


async def prepare(games: Path, practice: int, held_out: int) -> tuple[list[int], list[int]]:
    """Compile the games; return the seeds for practice and those held out, which are disjoint."""
    maker = TextWorld(games)
    families = [
        maker.tasks(split, number) for split, number in ((Split.PRACTICE, practice), (Split.HELD_OUT, held_out))
    ]
    await maker.prepare([task for tasks in families for task in tasks])
    return tuple([int(task.name) for task in tasks] for tasks in families)


async def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the whole benchmark and return its result."""
    games = options.games or work / "games"
    practice, held_out = await prepare(games, options.practice, options.held_out)
    tried: list[Tried] = []
    with OurServer(data=work / "data") as server:
        url = server.url
        author = Author(url, games, options.concurrency)
        tried.append(await author.measure("day one: v0, nothing remembered", held_out, "v0"))
        for cycle, num_rounds in enumerate(options.rounds, start=1):
            for number in range(num_rounds):
                tried.append(await author.practise(f"practice {cycle}.{number + 1}", practice))
            started = time.monotonic()
            is_last = cycle == len(options.rounds)
            settings = options.settings if is_last else [*options.settings, *FOR_WORDS]
            learned = await asyncio.to_thread(ask, url, "learn", "--logged", *settings)
            seconds = time.monotonic() - started
            print(f"  learn: {seconds:.0f} s, {learned['policy']}, {learned['reason']}", flush=True)
        candidate = learned["policy"]
        tried.append(await author.measure("v0 with what is remembered now", held_out, "v0"))
        tried.append(await author.measure(f"{candidate} with the same", held_out, candidate))
        judged = await asyncio.to_thread(ask, url, "judge", candidate)
        tried_by_name = [tried[0], *tried[-2:]]
        await author.close()
    day_one, before, after = ([each.won[str(seed)] for seed in held_out] for each in tried_by_name)
    return {
        "rounds": [each.row() for each in tried],
        "judged": {name: judged[name] for name in ("verdict", "reason", "policy", "active")},
        "learned": {key: learned["report"][key] for key in ("demonstrations", "preferences", "insights")},
        "after_against_day_one": vars(compare_paired(after, day_one)),
        "words_against_day_one": vars(compare_paired(before, day_one)),
        "after_against_words": vars(compare_paired(after, before)),
    }


def describe(result: dict[str, Any]) -> list[str]:
    """Return the summary of the rounds: paired differences, and the verdict."""
    lines = []
    for name in ("after_against_day_one", "words_against_day_one", "after_against_words"):
        paired = result[name]
        interval = f"{paired['low']:+.1%} to {paired['high']:+.1%}"
        lines.append(f"{name.replace('_', ' ')}: {paired['difference']:+.1%} ({interval}, p = {paired['p_value']:.2g})")
    judged = result["judged"]
    return [*lines, f"verdict: {judged['verdict']}, {judged['policy']}: {judged['reason']}"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--games", type=Path, help="where compiled games are, and are kept")
    parser.add_argument("--practice", type=int, default=64, help="games to practise on")
    parser.add_argument("--rounds", type=int, nargs="+", default=[3, 2], help="tries of each before each cycle")
    parser.add_argument("--held-out", type=int, default=200, help="games that measure")
    parser.add_argument("--concurrency", type=int, default=32, help="games at a time")
    parser.add_argument("--work", type=Path, help="where the server's data stay; else they are deleted")
    parser.add_argument("settings", nargs="*", help="for learn, e.g. --set recipe.sft_epochs=2 (after a --)")
    options = parser.parse_args()
    end_in_order()
    warnings.filterwarnings("ignore", message="Game .* is not fully supported")
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="log-only-")))
        work.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        result = asyncio.run(measure(options, work))
    result["seconds"] = round(time.monotonic() - started, 1)
    rounds, notes = result.pop("rounds"), describe(result)
    print_table("An app that knows only our address; 95 % intervals", rounds, notes=notes)
    conditions = {"practice": options.practice, "rounds": options.rounds, "settings": options.settings}
    write_json(options.json, "log_only", rounds, conditions=conditions, **result)


if __name__ == "__main__":
    main()
