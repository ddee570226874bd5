"""The server as a process, on a fake engine: it starts, answers, refuses a second server, and stops."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import serve
from tests.runtime.fake_engine import FakeEngine, Reply

ROOT = Path(serve.__file__).parent
START_SECONDS = 120


@pytest.fixture(scope="module")
def engine_url() -> Iterator[str]:
    """The address of a fake engine, which runs in its own thread."""
    loop, started, found = asyncio.new_event_loop(), threading.Event(), []

    async def run() -> None:
        async with FakeEngine(lambda request: Reply(f"said {request['messages'][-1]['content']}")) as engine:
            found.append(engine.url)
            started.set()
            await stop.wait()

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    assert started.wait(10)
    yield found[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


def begin(engine_url: str, data: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "serve.py", "serve", "--engine.url", engine_url, "--data", str(data), "--port", "0"]
    return subprocess.Popen(
        [*command, *more],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def server(engine_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict, subprocess.Popen[str]]]:
    """A running server, and the facts that it printed."""
    data = tmp_path_factory.mktemp("serve") / "data"
    process = begin(engine_url, data, "--json", "--tools.documents", "true")
    line = process.stdout.readline()
    assert line, process.stderr.read()
    yield json.loads(line), process
    process.kill()
    process.communicate()


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "serve.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS
    )


@pytest.mark.parametrize("form", ["toml", "flag"])
def test_a_password_for_others_to_read_is_refused_and_not_repeated(form: str, tmp_path: Path):
    url, config = "postgresql://u:s3cret@h/d", tmp_path / "ratchet.toml"
    config.write_text(f'[memory]\ndatabase = "{url}"\n' if form == "toml" else "")
    with pytest.raises(serve.Failure, match=r"memory\.database holds a password: .*PGPASSWORD") as refused:
        serve.read_all_settings(config, {}, ["--memory.database", url] if form == "flag" else [])
    assert "s3cret" not in str(refused.value)


def test_a_password_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RATCHET_MEMORY__DATABASE", "postgresql://u:s3cret@h/d")
    (tmp_path / "ratchet.toml").write_text("")
    assert serve.read_all_settings(tmp_path / "ratchet.toml", {}, []).memory.database.endswith("@h/d")


def test_a_started_server_answers(server) -> None:
    facts, _ = server
    body = {"model": "agent", "messages": [{"role": "user", "content": "hello"}]}
    assert httpx.get(f"{facts['url']}/readyz", trust_env=False, timeout=60).status_code == 200
    answer = httpx.post(f"{facts['url']}/v1/chat/completions", json=body, trust_env=False, timeout=30).json()
    assert answer["choices"][0]["message"]["content"] == "said hello"


def test_a_configured_tool_is_offered_to_the_model(server) -> None:
    facts, _ = server
    body = {"model": "agent", "messages": [{"role": "user", "content": "hello"}]}
    answer = httpx.post(f"{facts['url']}/v1/chat/completions", json=body, trust_env=False, timeout=30).json()
    trajectory = httpx.get(f"{facts['url']}/v1/trajectories/{answer['id']}", trust_env=False, timeout=60).json()
    assert [tool["function"]["name"] for tool in trajectory["tools"]] == ["search_documents"]


def test_a_cycle_without_enough_to_learn_from_says_how_much_is_missing(server) -> None:
    facts, _ = server
    done = run_cli("learn", "--practice", "0", "--url", facts["url"], "--json")
    assert done.returncode != 0
    assert "missing" in json.loads(done.stdout)["error"]["message"]


def test_a_cycle_setting_that_cannot_be_is_named_with_the_nearest(server) -> None:
    facts, _ = server
    done = run_cli("learn", "--set", "evaluation.num_task=3", "--url", facts["url"], "--json")
    assert "the nearest is 'evaluation.num_tasks'" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.parametrize(("share_live", "said"), [("user", "its own user alone"), ("tenant", "live requests included")])
def test_the_start_says_in_one_line_what_is_shared(engine_url: str, tmp_path: Path, share_live: str, said: str) -> None:
    process = begin(engine_url, tmp_path / "data", "--memory.share-live", share_live)
    try:
        lines = list(itertools.takewhile(lambda line: not line.startswith("Three things"), process.stdout))
    finally:
        process.terminate()
        process.communicate(timeout=START_SECONDS)
    assert sum(said in line for line in lines) == 1


def test_a_second_server_on_the_same_data_is_refused_in_one_line(server, engine_url: str) -> None:
    facts, process = server
    second = begin(engine_url, Path(facts["data"]))
    out, err = second.communicate(timeout=START_SECONDS)
    assert second.returncode != 0
    assert f"is in use by process {process.pid}" in err and err.count("\n") == 1
    assert "Traceback" not in out + err


def test_a_taken_port_is_refused_in_one_line(engine_url: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_cli("serve", "--engine.url", engine_url, "--data", str(tmp_path / "data"), "--port", str(port))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr and "--port" in done.stderr


def test_an_engine_that_is_not_there_is_said(tmp_path: Path) -> None:
    given = ["--engine.url", "http://127.0.0.1:9", "--data", str(tmp_path / "data"), "--port", "0"]
    done = run_cli("serve", *given, "--json")
    assert done.returncode == 1
    assert "no engine answers at 'http://127.0.0.1:9'" in json.loads(done.stdout)["error"]["message"]


def test_an_open_address_without_keys_ends_the_start_in_one_line(tmp_path: Path) -> None:
    given = ["--engine.url", "http://127.0.0.1:9", "--data", str(tmp_path / "data"), "--port", "0"]
    done = run_cli("serve", *given, "--host", "0.0.0.0")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "server.host = '0.0.0.0' is open to others" in done.stderr and "keys create" in done.stderr


def test_a_server_with_keys_may_listen_anywhere_and_asks_everybody(engine_url: str, tmp_path: Path) -> None:
    at = ["--data", str(tmp_path / "data"), "--json"]
    key = json.loads(run_cli("keys", "create", "operator", "--scope", "admin", *at).stdout)["key"]
    process = begin(engine_url, tmp_path / "data", "--json", "--host", "0.0.0.0")
    try:
        facts = json.loads(process.stdout.readline())
        url = facts["url"].replace("0.0.0.0", "127.0.0.1")
        assert facts["requires_key"] is True
        assert httpx.get(f"{url}/readyz", trust_env=False, timeout=60).status_code == 200
        assert httpx.get(f"{url}/v1/models", trust_env=False, timeout=60).status_code == 401
        mine = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{url}/v1/models", headers=mine, trust_env=False, timeout=60).status_code == 200
        beside, known = run_cli("keys", "list", *at), run_cli("keys", "list", "--key", key, *at)
        assert json.loads(beside.stdout)["error"]["code"] == "invalid_api_key"  # the owner answered, and requires a key
        assert [row["name"] for row in json.loads(known.stdout)["data"]] == ["operator"]
    finally:
        process.terminate()
        process.communicate(timeout=START_SECONDS)


def test_a_tool_that_cannot_be_had_ends_the_start_in_one_line(engine_url: str, tmp_path: Path) -> None:
    given = ["--engine.url", engine_url, "--data", str(tmp_path / "data"), "--port", "0"]
    done = run_cli("serve", *given, "--tools.functions", "no_shop:price")
    assert done.returncode == 1
    assert "the tool 'no_shop:price' cannot be imported" in done.stderr and "Traceback" not in done.stderr


def test_tools_that_the_chat_template_would_drop_end_the_start_by_their_names(engine_url: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    given = ["--engine.url", engine_url, "--engine.model", str(tmp_path), "--data", str(tmp_path / "data")]
    done = run_cli("serve", *given, "--port", "0", "--tools.documents", "true")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "'search_documents'" in done.stderr and 'engine.extra_args = ["--chat-template", ' in done.stderr


def test_a_library_that_is_still_at_work_does_not_spoil_the_exit_code():
    """On a normal exit of Python the library's thread would be unwound through C++, and abort the process: -6."""
    code = """
import threading, torch
from runtime.cli.output import exit_process
is_at_work = threading.Event()
def work():
    matrix = torch.randn(1000, 1000)
    while True:
        matrix = torch.mm(matrix, matrix)
        is_at_work.set()
threading.Thread(target=work, daemon=True).start()
is_at_work.wait()
print("said", end="")
exit_process(3)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said", "")


@pytest.mark.parametrize("arguments", [["--engine.modle", "x"], ["--server.port", "many"], ["stray"]])
def test_a_setting_that_cannot_be_ends_the_start(arguments: list[str]) -> None:
    done = run_cli("serve", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_a_termination_stops_it_in_good_order(engine_url: str, tmp_path: Path) -> None:
    process = begin(engine_url, tmp_path / "data", "--json")
    assert process.stdout.readline()
    process.terminate()
    out, err = process.communicate(timeout=START_SECONDS)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_termination_while_games_are_compiled_leaves_no_compiler_behind(engine_url: str, tmp_path: Path) -> None:
    # requests under way get a second to end, and not ten
    program = "import serve; from runtime.cli import server_process as it; it.STOP_SECONDS = 1; serve.main()"
    given = ["serve", "--engine.url", engine_url, "--data", str(tmp_path / "data"), "--port", "0", "--json"]
    process = subprocess.Popen([sys.executable, "-c", program, *given], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    compilers: set[int] = set()
    try:
        url = json.loads(process.stdout.readline())["url"]
        with httpx.Client(base_url=url, trust_env=False, timeout=START_SECONDS) as http:
            found = http.get("/v1/environments/textworld/tasks", params={"num_tasks": 200}).json()
            names = [task["name"] for task in found["data"]]

            def prepare() -> None:
                with contextlib.suppress(httpx.HTTPError):
                    http.post("/v1/environments/textworld/prepare", json={"tasks": names})

            preparing = threading.Thread(target=prepare, daemon=True)
            preparing.start()
            while not list((tmp_path / "data").rglob("*.z8")):  # one of many is compiled
                assert preparing.is_alive()
                time.sleep(0.02)
            compilers = sessions_begun_by(process.pid)
            process.terminate()
            assert compilers and process.wait(START_SECONDS) == 0
            preparing.join(START_SECONDS)
        deadline = time.monotonic() + START_SECONDS
        while any(map(members_of, compilers)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
        for pid in (pid for session in compilers for pid in members_of(session)):
            os.kill(pid, signal.SIGKILL)


def sessions_begun_by(parent: int) -> set[int]:
    """Return the sessions of a process's children that are not its own."""
    return {int(stat[3]) for stat in process_stats().values() if int(stat[1]) == parent} - {os.getsid(parent)}


def members_of(session: int) -> list[int]:
    """Return the processes of a session that have not ended."""
    return [pid for pid, stat in process_stats().items() if int(stat[3]) == session and stat[0] != "Z"]


def process_stats() -> dict[int, list[str]]:
    """Return the fields of /proc/PID/stat from the state on, by process id."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            stats[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
    return stats


def test_people_are_told_what_to_try(engine_url: str, tmp_path: Path) -> None:
    process = begin(engine_url, tmp_path / "data")
    lines = []
    while not lines or not lines[-1].startswith("Ctrl-C"):
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=START_SECONDS)
    text = "".join(lines)
    assert "There are no keys: it listens on the loopback only." in text
    assert "opening memory" in text and "Ratchet answers at http://127.0.0.1:" in text
    assert text.count("serve.py ") == 3 and "stopping" in rest
