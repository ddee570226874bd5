"""Reading task files: all rows or none, errors with file and line, and a name whose content never changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memory.schema import Split
from runtime.environments.graders.base import GradingResources
from runtime.environments.task_files.check import check_task_file
from runtime.environments.task_files.environment import TaskFile, open_task_file
from runtime.environments.task_files.reader import MAX_PROBLEMS, TaskNames
from runtime.environments.task_files.rows import derive_split
from runtime.errors import EnvironmentRefused, UnknownTask


def row(name: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What is {name}?"}]
    return {"name": name, "messages": messages, "grader": {"type": "exact", "answer": name}, **fields}


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")
    return path


def open_file(path: Path, resources: GradingResources | None = None) -> TaskFile:
    return open_task_file("mine", path, resources or GradingResources(), names_path=path.parent / "mine.names.json")


TOOL = {"type": "function", "function": {"name": "go", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ('{"name": "x"', "not JSON: Expecting ',' delimiter at character 14"),
        ("[1]", "a row is a JSON object, not list"),
        ("\udcff\udcfe", "not UTF-8: invalid start byte at byte 0"),
        ("[" * 100_000, "nested too deeply"),
        (row("a b"), "name: String should match pattern"),
        (row("x", split="test"), "split: Input should be 'practice', 'held-out' or 'sealed' ('test')"),
        (row("x", anwser="4"), "anwser: Extra inputs are not permitted ('4')"),
        (row("x", messages=[]), "messages: List should have at least 1 item"),
        (row("x", messages=[{"role": "assistant", "content": "4"}]), "the last message must be a user's or a tool's"),
        (row("x", grader={"type": "guess"}), "grader: Input tag 'guess' found using 'type' does not match any of"),
        (row("x", grader={"type": "regex", "pattern": "("}), "grader.regex.pattern: '(' is no regular expression"),
        (row("x", tools=[TOOL, TOOL]), "two tools are called 'go': rename one"),
        (row("x", tools=[{"function": {"name": "a.b"}}]), "tools.0.function.name: String should match pattern"),
        (row("x", tools=[{"function": {"name": "a", "parameters": {"type": "dict"}}}]), 'give them "type": "object"'),
        (row("x", tools=[TOOL], database=[]), "a row with a database brings its tools: leave `tools` out"),
        (row("x", grader={"type": "function_call", "calls": []}), "task 'x': the grader 'function_call' needs tools"),
        (row("x", grader={"type": "rubric", "rubric": "Polite."}), "task 'x': the grader 'rubric' needs a critic"),
        (row("x", grader={"type": "function", "name": "f"}), "task 'x': the function 'f' is not configured"),
        (row("x", grader={"type": "database_state", "digest": "0"}), "task 'x': the grader 'database_state' needs a"),
        (row("one"), "task 'one' stands in line 1 already: names are unique"),
        (
            row("x", demonstration=[{"role": "user", "content": "4"}]),
            "a demonstration ends with a message of the assis",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_and_nothing_is_taken(bad: Any, problem: str, tmp_path: Path):
    path = write(tmp_path / "tasks.jsonl", row("one"), "", bad, row("two"))
    with pytest.raises(EnvironmentRefused) as refused:
        open_file(path)
    first, line, *more = str(refused.value).splitlines()
    assert first == "1 rows are invalid, so no task was taken:" and not more
    assert line.startswith(f"{path}:3: ") and problem in line
    assert not (tmp_path / "mine.names.json").exists()


def test_all_bad_rows_are_named_up_to_a_number(tmp_path: Path):
    path = write(tmp_path / "tasks.jsonl", *("{" for _ in range(MAX_PROBLEMS + 3)))
    with pytest.raises(EnvironmentRefused) as refused:
        open_file(path)
    lines = str(refused.value).splitlines()
    assert lines[0].startswith(f"{MAX_PROBLEMS + 3} rows are invalid") and lines[-1] == "and 3 more"
    assert len(lines) == MAX_PROBLEMS + 2


@pytest.mark.parametrize("text", [None, "", "\n\n"])
def test_a_missing_or_empty_file_is_refused(text: str | None, tmp_path: Path):
    path = tmp_path / "tasks.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(EnvironmentRefused, match=r"tasks.jsonl' cannot be read|tasks.jsonl has no row"):
        open_file(path)


def test_splits_are_kept_apart_and_listed_in_the_files_order(tmp_path: Path):
    splits = ["held-out", "practice", "sealed", "held-out", "practice"]
    file = open_file(write(tmp_path / "t.jsonl", *(row(f"t{n}", split=split) for n, split in enumerate(splits))))
    assert [task.name for task in file.tasks(Split.PRACTICE, 9)] == ["t1", "t4"]
    assert [task.name for task in file.tasks(Split.HELD_OUT, 1, offset=1)] == ["t3"]
    assert [(task.name, task.split) for task in file.sealed_tasks(9)] == [("t2", Split.HELD_OUT)]
    assert [name for name in ("t0", "t1", "t2", "another's") if file.is_sealed(name)] == ["t2"]
    with pytest.raises(ValueError, match="mine has no split 'live': use practice or held-out"):
        file.tasks(Split.LIVE, 1)
    with pytest.raises(UnknownTask, match="mine has no task 't9'"):
        file.task("t9")


def test_a_split_that_is_not_given_follows_from_the_name_alone(tmp_path: Path):
    names = [f"t{number}" for number in range(1000)]
    file = open_file(write(tmp_path / "t.jsonl", *map(row, names)))
    shares = [
        len(file.tasks(Split.PRACTICE, 1000)),
        len(file.tasks(Split.HELD_OUT, 1000)),
        len(file.sealed_tasks(1000)),
    ]
    assert sum(shares) == 1000 and 560 < shares[0] < 640 and 260 < shares[1] < 340
    assert {derive_split(name) for name in names} == {"practice", "held-out", "sealed"}
    assert (derive_split("t0"), derive_split("t1"), derive_split("t2")) == ("practice", "held-out", "practice")


def test_a_name_means_one_task_for_ever(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    open_file(write(path, row("a"), row("b")))
    open_file(write(path, row("b"), row("c")))  # rows may be removed, moved and added
    reordered = dict(reversed(row("a").items()))
    demonstrated = {**row("b"), "demonstration": [{"role": "assistant", "content": "b"}]}
    open_file(write(path, reordered, demonstrated))  # the same tasks, written differently
    for changed in (row("a", split="held-out"), row("a", grader={"type": "exact", "answer": "A"})):
        with pytest.raises(EnvironmentRefused, match=r"t.jsonl:2: task 'a' was another task when it was first taken"):
            open_file(write(path, row("d"), changed))
    assert set(TaskNames(tmp_path / "mine.names.json").read()) == {"a", "b", "c"}


def test_a_damaged_record_of_names_is_named(tmp_path: Path):
    (tmp_path / "mine.names.json").write_text("{")
    with pytest.raises(EnvironmentRefused, match=r"mine.names.json is damaged .*restore it from a backup"):
        open_file(write(tmp_path / "t.jsonl", row("a")))


async def test_a_large_file_is_not_kept_in_memory(tmp_path: Path):
    import tracemalloc

    text = "x" * 20_000
    path = write(tmp_path / "t.jsonl", *(row(f"t{n}", kind=text[: n % 3 + 1]) for n in range(3)))
    with path.open("a") as file:
        for number in range(1000):
            message = {"role": "user", "content": text}
            file.write(json.dumps(row(f"large-{number}", messages=[message])) + "\n")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    environment = open_file(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2_000_000
    playthrough = await environment.start(environment.task("large-999"))
    assert playthrough.task_text == text


async def test_demonstrations_are_graded_by_their_own_rows(tmp_path: Path):
    def says(text: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": text}]

    def calls(name: str, **arguments: Any) -> dict[str, Any]:
        function = {"name": name, "arguments": json.dumps(arguments)}
        return {"role": "assistant", "tool_calls": [{"id": "c", "function": function}]}

    table = {"name": "t", "columns": [{"name": "n"}], "rows": [["7"]]}
    answers = {"type": "values", "answer": "7"}
    state = {"type": "database_state", "statement": "DELETE FROM t"}
    path = write(
        tmp_path / "t.jsonl",
        row("a", demonstration=says("a")),
        row("b", demonstration=says("wrong")),
        row("c", database=[table], grader=answers, demonstration=[calls("submit_answer", values=["7"])]),
        row(
            "d",
            database=[table],
            grader=state,
            demonstration=[calls("execute_sql", statement="DELETE FROM t"), *says("")],
        ),
        row("e", grader={"type": "rubric", "rubric": "Polite."}, demonstration=says("Good day.")),
    )
    checked = await check_task_file(path)
    assert (checked.num_tasks, checked.num_demonstrations) == (5, 4)
    assert checked.graders == {"exact": 2, "values": 1, "database_state": 1, "rubric": 1}
    assert checked.problems == [f"{path}:2: the demonstration of task 'b': expected 'b', not 'wrong'"]


def test_a_task_is_held_out_by_its_name_and_without_one_by_its_question_whatever_the_space_in_it(tmp_path: Path):
    asked_twice = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    same = [{"role": "user", "content": "Which fruit is there most of?"}]
    file = open_file(
        write(
            tmp_path / "tasks.jsonl",
            row("a", split="practice"),
            row("b", split="held-out"),
            row("c", split="sealed"),
            row("d", split="held-out", messages=[*asked_twice, {"role": "user", "content": "And 3 + 3?"}]),
            row("e", split="practice", messages=same),
            row("f", split="held-out", messages=same),
        )
    )
    assert [file.holds_out(name, []) for name in "abcd"] == [False, True, True, True]
    texts = ["What is a?", "What is b?", "What is c?", "And 3 + 3?", "2 + 2?", ""]
    for name in (None, "another's"):
        assert [file.holds_out(name, [text]) for text in texts] == [False, True, True, True, False, False]
    assert file.holds_out(None, ["Hello.", "\n What  is\tb? "]) and not file.holds_out(None, ["What isb?"])
    # the same question for two databases, distinguished by the name
    assert [file.holds_out(name, [same[0]["content"]]) for name in ("e", "f", None)] == [False, True, True]
    for name in (None, "row-17"):
        assert file.find_tasks(name, [same[0]["content"], "What is a?", "2 + 2?", ""]) == {"a", "e", "f"}
    assert file.find_tasks("e", ["What is a?"]) == {"e"}


@pytest.mark.parametrize(
    ("kinds", "missing"),
    [
        ("aaab" * 30, ""),
        ("a" * 90 + "b" * 30, "b"),
        ("b" * 30 + "c" * 30 + "a" * 30, "a, c"),
        ("a" * 91 + "b" * 29, ""),  # a rare kind
        ("a" * 120, ""),
    ],
)
async def test_a_split_whose_kinds_stand_in_blocks_is_named(tmp_path: Path, kinds: str, missing: str):
    rows = [row(f"t{number}", kind=kind, split="held-out") for number, kind in enumerate(kinds)]
    path = write(tmp_path / "t.jsonl", *rows, row("last", kind="z", split="practice"))
    checked = await check_task_file(path)
    warning = (
        f"{path}: the first {len(kinds) // 5} of {len(kinds)} held-out tasks have none of the kinds {missing}: "
        "tasks are taken in the file's order, so mix the kinds"
    )
    assert checked.warnings == ([warning] if missing else [])
    assert checked.problems == []
