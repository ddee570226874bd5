"""`import`, `export` and `examples` against a running server: files in, files out, interrupted and run again."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import serve
from memory.formats.registry import FORMATS, write_row
from runtime.cli.client import Client, ErrorReply, ServerUnreachable
from runtime.cli.datasets import exporting, importing
from runtime.cli.output import run
from tests.memory.formats.rows import ASKED, PREFERENCE, say
from tests.runtime.api.worlds import ServedWorld
from tests.support.shared_data import find_shared


@pytest.fixture
def cli(world: ServedWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable:
    monkeypatch.delenv("RATCHET_KEY", raising=False)

    def call(*arguments: str | Path) -> tuple[int, dict]:
        code = run(serve.app, [*map(str, arguments), "--url", world.url, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(number: int) -> list[dict]:
    # a line separator to Python, but plain text in JSON
    return [{"question": f"What is {each}\u2028+\x851?", "answer": str(each + 1)} for each in range(number)]


@pytest.mark.parametrize(
    ("name", "format_name", "num_rows"),
    [
        ("sharegpt_toolcalls/glaive_toolcall_en_300.json", "sharegpt", 300),
        ("sharegpt_toolcalls/kto_en_first60.json", "trl", 60),
        ("tau_bench/trajectories_gpt4o_airline.jsonl", "tau-bench", 200),
        ("xlam_form/xlam_form_from_bfcl_50.jsonl", "xlam", 50),
    ],
)
def test_a_real_file_is_imported_whole_and_a_second_time_not_at_all(
    world: ServedWorld, cli: Callable, name: str, format_name: str, num_rows: int
):
    path = find_shared(name)
    code, result = cli("import", path, "--environment", "doors")
    (file,) = result["files"]
    assert code == 0 and file["format"] == format_name and result["num_rows"] == num_rows
    assert result["num_added"] + result["num_known"] == num_rows and result["num_invalid"] == 0
    again = cli("import", path, "--environment", "doors")[1]
    assert again["num_added"] == 0 and again["num_known"] == num_rows
    (count, *_) = world.memory.examples.count()
    assert count[1:3] == ("doors", path.name)


def test_an_import_that_broke_off_is_run_again(world: ServedWorld, cli: Callable, tmp_path: Path, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", questions(1_700))
    sent: list[int] = []
    post_lines = Client.post_lines

    async def post_twice(self, *arguments, **query):
        sent.append(1)
        if len(sent) == 3:
            raise ServerUnreachable("the line is cut")
        return await post_lines(self, *arguments, **query)

    monkeypatch.setattr(Client, "post_lines", post_twice)
    code, failed = cli("import", path)
    assert (code, failed["error"]["code"], failed["error"]["num_stored"]) == (1, "no_server", 1_000)
    assert failed["error"]["message"] == (
        "the line is cut\n1000 of 1700 rows are stored, and perhaps some of the last request: "
        "run the same command again, and it skips them"
    )
    assert sum(number for *_, number in world.memory.examples.count()) == 2 * importing.MAX_BATCH_ROWS
    sent.clear()
    code, failed = cli("import", path)
    assert (code, failed["error"]["num_stored"]) == (1, 1_000)
    code, result = cli("import", path)
    assert (code, result["num_added"], result["num_known"]) == (0, 700, 1_000)


def test_an_import_that_the_server_breaks_off_says_so_and_what_is_stored(
    world: ServedWorld, cli: Callable, tmp_path: Path, monkeypatch
):
    files = [write_lines(tmp_path / f"{name}.jsonl", questions(number)) for name, number in (("a", 3), ("b", 5))]
    post_lines = Client.post_lines

    async def refuse_the_second(self, path, lines, **query):
        if query["source"] == "b.jsonl":
            raise ErrorReply({"status": 507, "message": "the disk is full", "code": "disk_full"})
        return await post_lines(self, path, lines, **query)

    monkeypatch.setattr(Client, "post_lines", refuse_the_second)
    code, failed = cli("import", *files)
    error = failed["error"]
    assert (code, error["status"], error["code"], error["num_stored"]) == (1, 507, "disk_full", 3)
    assert error["message"].startswith("the disk is full\n3 of 8 rows are stored")
    code, failed = cli("import", files[1])
    assert (code, failed["error"]["message"]) == (1, "the disk is full")


def test_an_invalid_line_of_the_last_file_imports_nothing_of_any(world: ServedWorld, cli: Callable, tmp_path: Path):
    good = write_lines(tmp_path / "good.jsonl", questions(3))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(good.read_text() + '\n{"question": 1, "answer": "2"}\n{"question": \n')
    code, failed = cli("import", good, bad)
    message = failed["error"]["message"]
    assert (
        code == 2 and f"{bad}:5: 'question' must be a text, not 1" in message and f"{bad}:6: the line is no" in message
    )
    assert failed["error"]["num_invalid"] == 2 and world.memory.examples.count() == []
    code, checked = cli("import", bad, "--check", "--on-error", "skip")
    assert code == 0 and checked["files"][0]["num_invalid"] == 2 and world.memory.examples.count() == []
    code, result = cli("import", good, bad, "--on-error", "skip")
    assert (code, result["num_added"], result["num_known"], result["num_invalid"]) == (0, 3, 3, 2)


@pytest.mark.parametrize(
    ("text", "arguments", "complaint"),
    [
        ('{"colour": "red"}\n', [], "is in no known format"),
        ('{"question": "a", "answer": "b"}\n', ["--format", "csv"], "no format is called 'csv'"),
        ('{"question": "a", "answer": "b"}\n', ["--on-error", "cry"], "stop or skip"),
        ('{"question": "a", "answer": "b"}\n', ["--environment", "cellar"], "'cellar'"),
    ],
)
def test_an_import_that_cannot_be_says_why(cli: Callable, tmp_path: Path, text: str, arguments: list, complaint: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    code, failed = cli("import", path, *arguments)
    assert code != 0 and complaint in failed["error"]["message"]
    code, failed = cli("import", tmp_path / "nowhere.jsonl")
    assert code == 2 and "cannot read" in failed["error"]["message"]


def test_rows_are_sent_in_requests_that_the_server_accepts(cli: Callable, tmp_path: Path):
    row = write_row(PREFERENCE, FORMATS["openai"])
    large = [row | {"preferred_output": [say("assistant", f"{each} {'x,' * 30_000}")]} for each in range(40)]
    many = [{"messages": [*ASKED, say("assistant", str(each))] * 300} for each in range(60)]
    code, result = cli("import", write_lines(tmp_path / "large.jsonl", [*large, *many]))
    assert (code, result["num_added"]) == (0, 100)


def test_an_export_that_broke_off_goes_on_where_it_stopped(
    world: ServedWorld, cli: Callable, tmp_path: Path, monkeypatch
):
    talk = [say("user", "Hi"), say("assistant", "Hello"), say("user", "Bye"), say("assistant", "So long")]
    path = write_lines(
        tmp_path / "rows.jsonl", [{"messages": [*talk, say("user", each), *talk[-1:]]} for each in "abc"]
    )
    assert cli("import", path)[1]["num_added"] == 3
    cli("import", write_lines(path, questions(950)))
    out, whole = tmp_path / "out.jsonl.gz", tmp_path / "whole.jsonl"
    monkeypatch.setattr(exporting, "ROWS_PER_CHECKPOINT", 100)
    stream_lines = Client.stream_lines
    cursors: list[str] = []

    async def stream_some(self, path, **query):
        cursors.append(query["after"])
        num = 0
        async for event in stream_lines(self, path, **query):
            num += 1
            if num == 350 and len(cursors) < 3:
                raise ServerUnreachable("the line is cut")
            yield event

    monkeypatch.setattr(Client, "stream_lines", stream_some)
    command = ("export", "demonstrations", "--format", "question-answer", "--out")
    for _ in range(2):
        assert cli(*command, out)[0] == 1 and not out.exists()
    part = out.with_name("out.jsonl.gz.part")
    part.write_bytes(part.read_bytes() + b"torn")
    code, other = cli("export", "demonstrations", "--format", "alpaca", "--out", out)
    assert code == 2 and "is the beginning of another export" in other["error"]["message"]
    code, result = cli(*command, out)
    assert (
        (code, result["num_rows"], sum(result["left_out"].values())) == (0, 950, 3)
        and "" not in cursors[1:]
        and len(set(cursors)) == 3
    )
    assert [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()] == questions(950)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data", "out.jsonl.gz", "rows.jsonl"]
    assert cli(*command, whole)[0] == 0 and whole.read_bytes() == gzip.decompress(out.read_bytes())
    code, failed = cli(*command, out)
    assert code == 2 and "exists: remove it" in failed["error"]["message"]


def test_what_is_exported_of_one_server_is_imported_by_another(cli: Callable, tmp_path: Path):
    path = find_shared("sharegpt_toolcalls/dpo_en_first60.json")
    cli("import", path)
    for name in ("trl", "sharegpt", "instruction-preference", "ratchet", "openai"):
        out = tmp_path / f"{name}.jsonl"
        assert cli("export", "preferences", "--format", name, "--out", out)[1]["num_rows"] == 60
        again = cli("import", out)[1]
        assert (again["files"][0]["format"], again["num_known"], again["num_added"]) == (name, 60, 0)


def test_examples_are_listed_shown_counted_and_removed(cli: Callable, tmp_path: Path):
    cli("import", write_lines(tmp_path / "rows.jsonl", questions(3)), "--source", "sums")
    _, page = cli("examples", "list", "--limit", "2")
    assert len(page["data"]) == 2
    assert cli("examples", "show", page["data"][0]["id"])[1]["prompt"][0]["content"] == "What is 2\u2028+\x851?"
    assert cli("examples", "count")[1]["data"][0]["num_examples"] == 3
    assert cli("examples", "remove", page["data"][0]["id"])[1]["num_deleted"] == 1
    assert cli("examples", "remove", "--source", "sums")[1]["num_deleted"] == 2
    code, failed = cli("examples", "remove")
    assert code == 2 and "by its ID, or all of a --source" in failed["error"]["message"]
