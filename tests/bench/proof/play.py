"""Plays one run of the proof: a server, the demonstrations, one cycle, and every episode of its gate."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory.formats import complete
from memory.formats.content import ExampleContent, ExampleKind
from memory.store import DATABASE_NAME
from runtime.environments.converters.make import make_task_file
from tests.bench.measure import machine
from tests.bench.proof.plan import Run, Subject
from tests.bench.server import ROOT, OurServer

CYCLE_SECONDS = 4 * 3600.0


def play(run: Run) -> dict[str, Any]:
    """Return what the run came to: {"run", "cells", "training", "selection", "verdict", "minutes", "stage_seconds",
    "tokens", "machine"}.

    `cells`: name -> {task: share of its tries that were won}, memory off. `tokens`: those of all episodes.
    """
    with tempfile.TemporaryDirectory(prefix="proof-") as made:
        home = Path(made)
        flags = write_tasks(run.subject, home)
        use_memory = run.subject.settings.get("evaluation.serve_with_memory", True)
        # Of the server too, or the gate would play an incumbent with the memory that this server's users get.
        flags += ["--optimizer.evaluation.serve_with_memory", str(use_memory).lower()]
        with OurServer("--engine.model", run.subject.model, *flags, data=home / "data") as server:
            start_from_base(server.url)
            seed_server(run, home, server.url)
            began = time.monotonic()
            settings = {**run.subject.settings, "methods": list(run.methods), "seed": run.seed}
            given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
            sets = [part for each in given for part in ("--set", each)]
            said = call(server.url, "learn", "--environment", run.subject.environment, *sets)
            minutes = (time.monotonic() - began) / 60
        return {
            "run": {"subject": run.subject.name, "methods": list(run.methods), "seed": run.seed},
            "cells": read_cells(home / "data"),
            # without the directories, which are of one machine and gone by then
            "training": {
                method: {name: value for name, value in trained.items() if name != "adapter"}
                for method, trained in said["report"]["training"].items()
            },
            **{name: said["report"][name] for name in ("selection", "stage_seconds")},
            "verdict": {name: said[name] for name in ("verdict", "reason", "policy")},
            "minutes": round(minutes, 1),
            "tokens": count_tokens(home / "data" / DATABASE_NAME),
            "machine": machine(),
        }


def start_from_base(url: str) -> None:
    """Take out of service the adapter that the model came with, so that the cycle starts from the bare base."""
    if call(url, "policies")["active"] != "v0":
        call(url, "rollback")


def write_tasks(subject: Subject, home: Path) -> list[str]:
    """Write the task file of a subject, and the settings that make it an environment; return the server's flags."""
    if subject.benchmark is None or subject.source is None:
        return []
    path = home / f"{subject.environment}.jsonl"
    make_task_file(subject.benchmark, subject.source, path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if not subject.kinds or row["kind"] in subject.kinds]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
    config = home / "ratchet.toml"
    lines = [f"[environments.{subject.environment}]", f"tasks = {json.dumps(str(path))}"]
    lines += [f"max_output_tokens = {subject.max_output_tokens}"]
    config.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return ["--config", str(config)]


def seed_server(run: Run, home: Path, url: str) -> None:
    """Import demonstrations of practice tasks that the cycle neither explores nor chooses by; other ones for other
    seeds."""
    if not run.subject.num_demonstrations:
        return
    tasks = [json.loads(line) for line in (home / f"{run.subject.environment}.jsonl").read_text().splitlines()]
    practice = [task for task in tasks if task["split"] == "practice"]
    shown = [task for task in practice[run.subject.num_played :] if "demonstration" in task]
    chosen = random.Random(run.seed).sample(shown, min(run.subject.num_demonstrations, len(shown)))
    rows = [
        complete.write(
            ExampleContent(
                ExampleKind.DEMONSTRATION,
                it["messages"] + it["demonstration"],
                tools=it.get("tools", []),
                task=it["name"],
            )
        )
        for it in chosen
    ]
    path = home / "demonstrations.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    call(url, "import", str(path), "--environment", run.subject.environment)


def read_cells(data: Path) -> dict[str, dict[str, float]]:
    """Return the outcomes of every cell that the gate played with memory off, task by task."""
    cells = {}
    for path in sorted(data.glob("cycles/*/cell-*-off.json")):
        won: dict[str, list[bool]] = {}
        for episode in json.loads(path.read_text()):
            won.setdefault(episode["task"], []).append(episode["is_success"])
        cells[path.stem.removeprefix("cell-").removesuffix("-off")] = {
            task: sum(tries) / len(tries) for task, tries in won.items()
        }
    return cells


def count_tokens(database: Path) -> dict[str, int]:
    """Return the tokens of all episodes of a server that has stopped."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        row = connection.execute("SELECT sum(prompt_tokens), sum(output_tokens) FROM trajectories").fetchone()
    return {"prompt": row[0], "output": row[1]}


def call(url: str, *command: str) -> dict[str, Any]:
    """Run a command of the command line and return what it prints as JSON. Raises RuntimeError if it fails."""
    whole = [sys.executable, "serve.py", *command, "--url", url, "--json"]
    done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=CYCLE_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout)
