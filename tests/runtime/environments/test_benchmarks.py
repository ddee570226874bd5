"""Published benchmarks as task files: the number of tasks, the splits, and no leak between them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from runtime.environments.converters.bfcl import divide_by_function
from runtime.environments.converters.make import make_task_file
from runtime.environments.graders.base import GradingResources, Submission
from runtime.environments.graders.code import UnitTests
from runtime.environments.task_files.check import check_task_file
from tests.support.shared_data import find_shared, read_shared_rows


def make(benchmark: str, folder: str, tmp_path: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    made = make_task_file(benchmark, find_shared(folder), tmp_path / "tasks.jsonl")
    return made.splits, [json.loads(line) for line in made.path.read_text(encoding="utf-8").splitlines()]


async def test_bfcl_offers_no_function_on_two_sides_and_its_demonstrations_are_right(tmp_path: Path):
    splits, rows = make("bfcl", "bfcl", tmp_path)
    assert splits == {"practice": 839, "held-out": 519, "sealed": 172}
    sides: dict[str, set[str]] = {}
    for row in rows:
        for tool in row["tools"]:
            sides.setdefault(tool["function"]["name"].lower().replace("_", ""), set()).add(row["split"])
        assert row["split"] == "practice" or "demonstration" not in row
    assert [name for name, splits in sides.items() if len(splits) > 1] == []
    checked = await check_task_file(tmp_path / "tasks.jsonl")
    assert (checked.num_demonstrations, checked.problems, checked.warnings) == (832, [], [])


def test_the_first_tasks_of_a_made_file_are_of_its_frequent_kinds_wherever_they_were_published(tmp_path: Path):
    _, rows = make("bfcl", "bfcl", tmp_path)
    held_out = [row["kind"] for row in rows if row["split"] == "held-out"]
    share = {kind: count / len(held_out) for kind, count in Counter(held_out).items()}
    first = Counter(held_out[:120])
    assert len(share) > 4
    assert all(abs(first[kind] / 120 - share[kind]) < 0.1 for kind in share)
    published = tmp_path / "published"
    published.mkdir()
    questions = [{"question": f"{number} + 2?", "answer": f"#### {number + 2}"} for number in range(40)]
    (published / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in questions))
    made = make_task_file("gsm8k", published, tmp_path / "sums.jsonl")
    names = [json.loads(line)["name"] for line in made.path.read_text().splitlines()]
    assert names == sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()) != sorted(names)


def test_functions_that_are_offered_together_stay_together():
    def task(*names: str) -> dict[str, Any]:
        tools = [{"function": {"name": name, "parameters": {"required": []}}} for name in names]
        return {"tools": tools, "grader": {"calls": []}}

    # 40 pairs of one group each, and a third task that joins two of them
    tasks = [task(f"f{n}", f"g{n}") for n in range(40)] + [task("g3", "f17"), task("G3_")]
    splits = [each["split"] for each in divide_by_function(tasks)]
    assert splits[3] == splits[17] == splits[40] == splits[41]
    assert set(splits) == {"practice", "held-out", "sealed"}
    reversed_splits = [each["split"] for each in divide_by_function(tasks[::-1])]
    assert reversed_splits[::-1] == splits


@pytest.mark.parametrize(
    ("benchmark", "folder", "expected"),
    [
        ("beerqa", "beerqa_1000/beerqa_train_subsample.json", {"practice": 621, "held-out": 271, "sealed": 108}),
        ("gsm8k", "gsm8k", {"practice": 7473, "held-out": 1319}),
        ("math500", "math500", {"held-out": 500}),
        ("humaneval", "humaneval", {"held-out": 164}),
        ("mbpp", "mbpp_py", {"practice": 162, "held-out": 235}),
        ("agentbench-db", "agentbench", {"practice": 60, "held-out": 300}),
        ("agentbench-os", "agentbench", {"practice": 40, "held-out": 23}),
    ],
)
def test_test_sets_are_held_out(benchmark: str, folder: str, expected: dict[str, int], tmp_path: Path):
    splits, rows = make(benchmark, folder, tmp_path)
    assert splits == expected
    assert len({row["name"] for row in rows}) == len(rows)
    texts = Counter((row["messages"][-1]["content"], row["split"]) for row in rows)
    asked = {text for text, split in texts if split == "practice"} & {
        text for text, split in texts if split != "practice"
    }
    assert not asked
    assert all("demonstration" not in row for row in rows if row["split"] != "practice")


def test_agentbenchs_database_tasks_are_found_under_the_names_of_its_repository(tmp_path: Path):
    (tmp_path / "dbbench").mkdir()
    for part in ("dev", "standard"):
        shutil.copy(find_shared(f"agentbench/dbbench_{part}.jsonl"), tmp_path / "dbbench" / f"{part}.jsonl")
    make_task_file("agentbench-db", tmp_path / "dbbench", tmp_path / "out.jsonl")
    make_task_file("agentbench-db", find_shared("agentbench"), tmp_path / "same.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "same.jsonl").read_bytes()


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no 'bwrap' on the PATH: install bubblewrap to run code")
async def test_published_solutions_of_humaneval_pass_and_their_stumps_do_not(tmp_path: Path):
    import gzip

    text = gzip.decompress(find_shared("humaneval/HumanEval.jsonl.gz").read_bytes()).decode()
    solutions = {row["task_id"]: row["canonical_solution"] for row in map(json.loads, text.splitlines())}
    _, rows = make("humaneval", "humaneval", tmp_path)
    for row in rows[:24:6]:
        rule, solution = UnitTests.model_validate(row["grader"]), solutions[row["name"]]
        whole = f"```python\n{rule.prompt}{solution}```"
        graded = [await rule.grade(Submission(text), GradingResources()) for text in (solution, whole, "    pass\n")]
        assert [outcome.value for outcome in graded] == [1.0, 1.0, 0.0], row["name"]


def test_what_is_not_the_benchmark_writes_nothing(tmp_path: Path):
    (tmp_path / "test.jsonl").write_text('{"question": "2 + 2?"}\n')
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match=r"is not gsm8k as it is published: KeyError\('answer'\)"):
        make_task_file("gsm8k", tmp_path, out)
    with pytest.raises(
        ValueError, match="no benchmark is called 'gsm9k'; there is: agentbench-db, agentbench-os, beerqa, bfcl"
    ):
        make_task_file("gsm9k", tmp_path, out)
    with pytest.raises(ValueError, match=r"holds no file 'HumanEval.jsonl\*'"):
        make_task_file("humaneval", tmp_path, out)
    with pytest.raises(ValueError, match="holds no file of bfcl"):
        make_task_file("bfcl", tmp_path, out)
    (tmp_path / "test.jsonl").write_text('{"question": "2 + 2?", "answer": "#### four"}\n')
    with pytest.raises(ValueError, match=r"task 'gsm8k-test-0': grader\.numeric\.answer: 'four' holds no number"):
        make_task_file("gsm8k", tmp_path, out)
    assert not out.exists()


def test_gsm8k_demonstrations_are_free_of_the_calculators_marks():
    rows = read_shared_rows("gsm8k/train.jsonl")
    assert any("<<" in row["answer"] for row in rows)
    from runtime.environments.converters.mathematics import read_gsm8k

    tasks = list(read_gsm8k(find_shared("gsm8k/train.jsonl")))
    assert not any("<<" in task["demonstration"][0]["content"] for task in tasks)
