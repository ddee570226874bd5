"""Answers as critics write them, written by hand for this corpus, and the operations that must be parsed from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from memory.records.insights import InsightOperation, OperationKind
from optimizer.insights.parsing import MAX_INSIGHT_CHARS, is_lesson, parse_operations

PLACE = ("kitchen", "cooking")
KNOWN = [
    "Read the cookbook before you take anything.",
    "Never use the oven.",
    "fry the _ -> cook _ with stove",
    "Open every closed drawer before you search the next room.",
]
MARK = "##### "


def read_corpus() -> dict[str, tuple[str, list[str] | None]]:
    """Return name -> (answer, the expected operations, one a line; None: it is no answer)."""
    corpus = {}
    for path in sorted((Path(__file__).parent / "critic_outputs").glob("*.txt")):
        blocks = [block.split("\n", 1) for block in path.read_text(encoding="utf-8").split(MARK)[1:]]
        for (name, answer), (expect, operations) in zip(blocks[::2], blocks[1::2], strict=True):
            assert expect in ("expect", "expect nonsense"), expect
            wanted = None if expect.endswith("nonsense") else operations.strip().splitlines()
            corpus[f"{path.stem}: {name}"] = (answer, wanted)
    return corpus


CORPUS = read_corpus()


def describe(operation: InsightOperation) -> str:
    kind = operation.kind.name
    if operation.kind is OperationKind.ADD:
        return f"ADD {operation.text}"
    number = KNOWN.index(operation.text) + 1
    return f"EDIT {number} -> {operation.new_text}" if operation.kind is OperationKind.EDIT else f"{kind} {number}"


@pytest.mark.parametrize("name", CORPUS)
def test_a_critics_answer_is_read_as_it_was_meant(name: str):
    answer, wanted = CORPUS[name]
    operations = parse_operations(answer, PLACE, KNOWN)
    assert (None if operations is None else [describe(operation) for operation in operations]) == wanted


def test_the_corpus_is_of_many_kinds_and_sizes():
    assert len(CORPUS) >= 60
    assert len({name.split(":")[0] for name in CORPUS}) >= 7


@pytest.mark.parametrize("name", CORPUS)
def test_no_answer_stores_a_mark_an_operator_or_too_little(name: str):
    for operation in parse_operations(CORPUS[name][0], PLACE, []) or []:
        assert is_lesson(operation.text) and len(operation.text) <= MAX_INSIGHT_CHARS


def test_an_endless_answer_is_read_in_a_moment():
    for answer in ("[" * 30_000, "{" * 30_000, "ADD " * 10_000, "ADD: x\n" * 5_000, "- " * 20_000, "1. " * 10_000):
        assert parse_operations(answer, PLACE, KNOWN) in (None, [])
