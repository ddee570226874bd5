"""AgentBench's operating-system tasks: their conversion, and the authors' own solutions, which must be accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.environments.converters.agentbench_os import PublishedTask, read_agentbench_os, read_published
from runtime.environments.converters.make import make_task_file
from runtime.environments.converters.published import SkippedTask, read_json_list
from tests.bench.agentbench_os import check_all
from tests.support.machines import needs_machine
from tests.support.shared_data import find_shared

COUNTED = {"check": [None, {"language": "python", "file": "check/integer-match.py"}], "example": "ls /srv | wc -l"}
ROW = {"description": "How many?", "create": {"init": {"code": "touch /srv/a"}}, "evaluation": COUNTED, "labels": ["x"]}


def publish(folder: Path, **files: list[dict[str, Any]]) -> Path:
    """Write files in AgentBench's layout; a name such as `train_0317__training` has its folder before `__`."""
    for name, rows in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1))
    return folder


def test_training_tasks_are_practice_and_all_others_held_out(tmp_path: Path):
    folder = publish(tmp_path, train_0317__training=[ROW, ROW], data__dev=[ROW], data__1__a=[ROW], data__6backup=[ROW])
    made = make_task_file("agentbench-os", folder, tmp_path / "os.jsonl")
    rows = [json.loads(line) for line in made.path.read_text().splitlines()]
    assert {row["name"]: row["split"] for row in rows} == {
        "os-dev-0": "held-out",
        "os-1-a-0": "held-out",
        "os-training-0": "practice",
        "os-training-1": "practice",
    }
    assert rows[0]["grader"]["checks"] == [
        {"run": {"language": "bash", "code": "ls /srv | wc -l"}},
        {"compare": "integer"},
    ]
    assert rows[0]["machine"] == {"setup": [{"language": "bash", "code": "touch /srv/a"}], "start": ""}


def test_scripts_are_read_from_the_folder_of_their_file(tmp_path: Path):
    scripts = {"check": {"file": "check/0.sh"}, "example": {"file": "example/0.sh"}}
    row = {"description": "Do it.", "create": {"init": [{"file": "init.sh"}, "echo 2"]}, "evaluation": scripts}
    folder = publish(tmp_path, data__5__new=[row])
    for name, text in (("init.sh", "echo 1"), ("check/0.sh", "exit 0"), ("example/0.sh", "touch /x")):
        path = folder / "scripts" / "5" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (task,) = read_published(folder)
    assert isinstance(task, PublishedTask) and task.example is not None
    assert [script["code"] for script in task.content["machine"]["setup"]] == ["echo 1", "echo 2"]
    assert task.content["grader"]["checks"] == [{"run": {"language": "bash", "code": "exit 0"}}]
    assert task.example.code == "touch /x"


def test_a_comparing_script_that_is_another_one_runs_as_it_is(tmp_path: Path):
    folder = publish(tmp_path, data__dev=[ROW])
    path = folder / "scripts" / "dev" / "check" / "integer-match.py"
    path.parent.mkdir(parents=True)
    path.write_text("exit(0)")
    (task,) = read_agentbench_os(folder)
    assert not isinstance(task, SkippedTask)
    assert task["grader"]["checks"][1] == {"run": {"language": "python", "code": "exit(0)"}}


def test_rows_that_are_not_as_published_are_all_named_by_file_and_line_and_nothing_is_written(tmp_path: Path):
    rows = [
        ROW,
        {"evaluation": COUNTED},
        {**ROW, "evaluation": {"check": [None]}},
        {**ROW, "evaluation": {}},
        {**ROW, "create": {"init": {"language": "perl", "code": "1"}}},
    ]
    (tmp_path / "os_dev.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    with pytest.raises(ValueError, match="4 rows are not as AgentBench publishes them") as refused:
        make_task_file("agentbench-os", tmp_path, tmp_path / "os.jsonl")
    message = str(refused.value)
    for line, problem in ((3, "description: Field required"), (4, "stands for the example"), (5, "a match or a check")):
        assert f"{tmp_path}/os_dev.json:{line}: " in message and problem in message
    assert f"{tmp_path}/os_dev.json:6: create" in message and not (tmp_path / "os.jsonl").exists()
    with pytest.raises(ValueError, match=r"holds no file 'data/dev.json'"):
        make_task_file("agentbench-os", tmp_path / "nowhere", tmp_path / "os.jsonl")


def test_tasks_that_no_machine_can_hold_are_left_out_with_their_lines(tmp_path: Path):
    def checked(**change: Any) -> dict[str, Any]:
        return {**ROW, **change}

    rows = [
        checked(create={"init": "apt update && apt install sudo -y"}),
        checked(evaluation={"check": "runuser -l eve -c 'cat /x'", "example": "true"}),
        checked(create={"init": "chmod u+s /usr/bin/find"}),
        checked(create={"init": {"file": "init/none.sh"}}),
        checked(create={"init": "useradd -G root,sudo eve; echo an apt remark > /srv/apt"}),
    ]
    (tmp_path / "os_dev.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    made = make_task_file("agentbench-os", tmp_path, tmp_path / "os.jsonl")
    assert made.num_tasks == 1 and len(made.left_out) == 4
    for line, reason in enumerate(("installs packages", "several users", "the host's", "init/none.sh' is missing"), 2):
        assert (
            made.left_out[line - 2].startswith(f"{tmp_path}/os_dev.json:{line}: ") and reason in made.left_out[line - 2]
        )


@pytest.mark.parametrize(
    ("text", "problem"), [("[{},\n{]", ":2 is not JSON"), ("[{}", "is not closed"), ("[] 1", "behind")]
)
def test_a_list_that_is_not_json_is_named_by_its_line(text: str, problem: str, tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        list(read_json_list(path))
    path.write_text('\n{"a": 1}\n')
    assert list(read_json_list(path)) == [(2, {"a": 1})]


async def check_published(part: slice) -> tuple[int, dict[str, Any]]:
    tasks = [each for each in read_published(find_shared("agentbench")) if isinstance(each, PublishedTask)]
    results = await check_all(tasks[part])
    return len(results), {name: failed for name, failed in results.items() if any(failed.values())}


@needs_machine
async def test_solutions_of_the_authors_are_accepted_and_empty_answers_refused():
    assert await check_published(slice(None, None, 6)) == (11, {})


@needs_machine
@pytest.mark.slow
async def test_all_solutions_of_the_authors_are_accepted_and_empty_answers_refused():
    assert await check_published(slice(None)) == (63, {})
