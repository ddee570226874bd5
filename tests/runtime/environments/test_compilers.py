"""Game compilers: a global limit on their number, and no compiler outlives its caller or the server.

The compiler's process is real; only the compilation of a game is a fake.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memory.schema import Split
from runtime.environments.compilers import COMMAND, GAMES_PER_SLOT, ROOT, CompilerPool
from runtime.environments.textworld import TextWorld
from runtime.errors import GameNotCompiled

PLAYED = """
import os, subprocess, sys, time
from pathlib import Path
from runtime.environments import game_compiler, textworld

def compile(seed, game_file):
    {body}
    game_file.write_text(str(seed))

textworld.compile_cooking_game = compile
game_compiler.main()
"""
HANGS = """
    compiler = subprocess.Popen(["sleep", "600"])
    partial = game_file.with_name(f"partial-{os.getpid()}-{game_file.name}")
    partial.write_text("half")
    game_file.with_name("pids.new").write_text(f"{os.getpid()} {compiler.pid}")
    game_file.with_name("pids.new").rename(game_file.with_name("pids"))
    compiler.wait()
"""
COUNTS = """
    with (game_file.parent / "log").open("a") as log:
        print(os.getpid(), time.monotonic(), file=log, flush=True)
        time.sleep(0.05)
        print(os.getpid(), time.monotonic(), file=log, flush=True)
"""


def command(body: str) -> list[str]:
    return [sys.executable, "-c", PLAYED.replace("{body}", body.strip())]


def jobs(directory: Path, *seeds: int) -> list[tuple[int, Path]]:
    return [(seed, directory / f"cooking-{seed}.z8") for seed in seeds]


def nothing() -> None:
    return None


async def wait_for_pids(directory: Path) -> list[int]:
    async with asyncio.timeout(120):
        while not (directory / "pids").exists():
            await asyncio.sleep(0.02)
    return [int(pid) for pid in (directory / "pids").read_text().split()]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def are_gone(pids: list[int], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not all(map(is_gone, pids)):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


async def test_who_is_cancelled_kills_its_compilers_and_leaves_the_loop_running(tmp_path: Path):
    pool = CompilerPool(command(HANGS), num_children=1)
    preparing = asyncio.ensure_future(pool.compile(jobs(tmp_path, 1), nothing))
    pids = await wait_for_pids(tmp_path)
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(0)

    beating = asyncio.ensure_future(beat())
    preparing.cancel()
    await asyncio.wait({preparing}, timeout=30)  # the compiler would run for ten minutes
    beating.cancel()

    assert preparing.cancelled() and beats > 1
    assert await are_gone(pids)
    assert list(tmp_path.glob("partial-*")) == []


async def test_a_compiler_and_what_it_started_die_with_a_server_that_is_killed(tmp_path: Path):
    program = f"""
import asyncio
from pathlib import Path
from runtime.environments.compilers import CompilerPool
pool = CompilerPool({command(HANGS)!r}, num_children=1)
asyncio.run(pool.compile([(1, Path({str(tmp_path / "cooking-1.z8")!r}))], lambda: None))
"""
    server = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        pids = await wait_for_pids(tmp_path)
        assert not any(map(is_gone, pids))
        server.send_signal(signal.SIGKILL)
        assert await are_gone(pids)
    finally:
        server.kill()
        server.wait()


async def test_ten_callers_have_no_more_compilers_than_one(tmp_path: Path):
    pool = CompilerPool(command(COUNTS), num_children=2)
    for caller in range(10):
        (tmp_path / str(caller)).mkdir()
    wanted = [jobs(tmp_path / str(caller), 1, 2) for caller in range(10)]
    await asyncio.gather(*(pool.compile(each, nothing) for each in wanted))

    assert all(path.exists() for each in wanted for _, path in each)
    lines = [line.split() for log in tmp_path.glob("*/log") for line in log.read_text().splitlines()]
    spans: dict[str, list[float]] = {}
    for pid, moment in lines:
        spans.setdefault(pid, []).append(float(moment))
    at_work = [
        sum(min(span) <= moment <= max(span) for span in spans.values())
        for moments in spans.values()
        for moment in moments
    ]
    assert max(at_work) <= 2


async def test_one_game_does_not_wait_for_somebodys_hundred(tmp_path: Path):
    (tmp_path / "many").mkdir()
    (tmp_path / "one").mkdir()
    pool, num_done = CompilerPool(command("pass"), num_children=1), 0

    def count() -> None:
        nonlocal num_done
        num_done += 1

    many = asyncio.ensure_future(pool.compile(jobs(tmp_path / "many", *range(100)), count))
    async with asyncio.timeout(120):
        while num_done == 0:
            await asyncio.sleep(0)
    await pool.compile(jobs(tmp_path / "one", 1), nothing)
    assert num_done <= 2 * GAMES_PER_SLOT
    await many
    assert num_done == 100


async def test_a_compiler_that_dies_says_why_and_one_that_hangs_is_killed(tmp_path: Path):
    with pytest.raises(GameNotCompiled, match=r"game 7 died: (?s:.)*no room"):
        await CompilerPool(command("raise OSError('no room')")).compile(jobs(tmp_path, 7), nothing)
    pool = CompilerPool(command(HANGS), game_seconds=20)
    with pytest.raises(GameNotCompiled, match="game 8 was not compiled within 20 seconds"):
        await pool.compile(jobs(tmp_path, 8), nothing)
    assert await are_gone(await wait_for_pids(tmp_path))


async def test_the_real_compiler_makes_a_game_that_can_be_played(tmp_path: Path):
    environment = TextWorld(tmp_path, CompilerPool(COMMAND, num_children=1))
    told: list[tuple[int, int]] = []
    task = environment.tasks(Split.PRACTICE, 1)[0]
    await environment.prepare([task, task], lambda done, total: told.append((done, total)))
    assert told == [(1, 1)]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".z8"]
    playthrough = await environment.start(task)
    assert "You are hungry" in playthrough.task_text
    await playthrough.close()
    assert os.listdir(tmp_path) != []
