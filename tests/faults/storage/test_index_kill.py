"""SIGKILL while the index is written, and damaged index files: the text index still answers, and the index heals.

Chroma runs in the process that queries it, so it is killed with it; a hanging Chroma is tested with the index.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlmodel import select

from memory.schema import Passage
from memory.store import Memory
from tests.memory.episodes import PATIENT, HashingEncoder

ROOT = Path(__file__).parents[3]
WRITER = """
import asyncio, sys
from pathlib import Path
from memory.store import Memory
from tests.memory.episodes import PATIENT, HashingEncoder

async def main():
    with Memory.open(Path(sys.argv[1]), PATIENT, encoder=HashingEncoder()) as memory:
        await memory.index.drain()
        kept = [it for it in memory.documents.select() if it.title.startswith("Carrots")]
        number = len(kept)
        while True:
            words = "\\n\\n".join(f"carrot {sys.argv[2]} {number} " + "fry " * 150 + str(part) for part in range(6))
            document = await memory.documents.ingest(f"Carrots {sys.argv[2]} {number}", words)
            number += 1
            kept.append(document)
            if number % 3 == 0:
                await memory.documents.remove(kept.pop(0).id)
            print(number, flush=True)
            await asyncio.sleep(0.005)

asyncio.run(main())
"""


def write_until_killed(data_dir: Path, round_: int, num_lines: int) -> None:
    """Let a process write documents, and kill it while its index sync indexes them."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(data_dir), str(round_)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(num_lines):
            assert process.stdout.readline(), "the writer ended by itself"
        process.kill()


def leave(_home: Path) -> None:
    """Damage nothing."""


def delete(home: Path) -> None:
    shutil.rmtree(home)


def truncate(home: Path) -> None:
    for path in home.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_vectors(home: Path) -> None:
    """Delete the vector graphs, but not Chroma's database, which refers to them."""
    for path in home.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


DAMAGES = (leave, truncate, delete, delete_vectors)


async def find_missing_and_orphans(memory: Memory) -> tuple[set[str], set[str]]:
    """Return the rows missing in either index, and the entries without a row, once the index is up to date."""
    await memory.index.drain()
    with memory.database.read() as session:
        rows = set(session.exec(select(Passage.id)))
    worded = set(memory.index._text_index.digests("passages"))
    meant = set(memory.index._vector_index.digests("passages"))
    return (rows - worded) | (rows - meant), (worded - rows) | (meant - rows)


async def keep_one(data_dir: Path) -> None:
    """Index a document that is never deleted, so that a search must always find it."""
    with Memory.open(data_dir, PATIENT, encoder=HashingEncoder()) as memory:
        await memory.documents.ingest("Stew", "A carrot in a stew.")
        await memory.index.drain()


async def survive(data_dir: Path, round_: int, num_lines: int, damage: Callable[[Path], None]) -> None:
    write_until_killed(data_dir, round_, num_lines)
    for home in (data_dir / "chroma").glob("idx_*"):
        damage(home)
    with Memory.open(data_dir, PATIENT, encoder=HashingEncoder()) as memory:
        assert await memory.index.find("passages", "carrot"), f"nothing was found after {damage.__name__}"
        assert await find_missing_and_orphans(memory) == (set(), set()), f"not healed after {damage.__name__}"
        for home in (data_dir / "chroma").glob("idx_*"):
            damage(home)
            while damage in (truncate, delete) and home.exists():  # until it is noticed and moved away
                assert await memory.index.find("passages", "carrot"), f"nothing was found under {damage.__name__}"
        assert await memory.index.find("passages", "carrot"), f"nothing was found under {damage.__name__}"
        await memory.documents.ingest(f"Potatoes {round_}", "roast the potato")
        assert await find_missing_and_orphans(memory) == (set(), set()), f"not healed under {damage.__name__}"


@pytest.mark.parametrize("damage", [leave, truncate], ids=lambda damage: damage.__name__)
async def test_an_index_killed_in_the_midst_heals(tmp_path: Path, damage: Callable[[Path], None]):
    await keep_one(tmp_path)
    await survive(tmp_path, 0, 4, damage)


@pytest.mark.slow
@pytest.mark.parametrize("twenty", range(10))
async def test_two_hundred_kills_leave_nothing_missing_and_no_orphans(tmp_path: Path, twenty: int):
    await keep_one(tmp_path)
    chance = random.Random(twenty)
    for round_ in range(20):
        await survive(tmp_path, round_, chance.randrange(1, 12), DAMAGES[round_ % len(DAMAGES)])
