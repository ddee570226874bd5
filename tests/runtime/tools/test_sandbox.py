"""Sandboxed Python: refused without bubblewrap, contained with it, and never run in any other way."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.config import ToolsConfig
from runtime.errors import ToolRefused
from runtime.tools.base import ToolResult, run_tool
from runtime.tools.sandbox import SandboxLimits, check_sandbox, drop_root_command, python_tool, sandboxed_python
from runtime.tools.toolbox import Toolbox

needs_bwrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="no 'bwrap' on the PATH: install bubblewrap to run code in the real sandbox"
)


async def find_nothing(query_text: str, num: int) -> list[str]:
    return []


async def test_without_bubblewrap_the_tool_is_refused_by_name_at_the_start(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # an empty directory
    with pytest.raises(ToolRefused, match=r"the tool 'run_python' needs bubblewrap.*install it.*tools.python = false"):
        await Toolbox(ToolsConfig(python=True), find_nothing, tmp_path).open()


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A world-writable directory: if the tests run as root, bubblewrap runs as `nobody`."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


async def test_a_bubblewrap_that_does_not_work_is_refused_with_its_words(open_dir: Path):
    broken = open_dir / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied'\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(ToolRefused, match=r"'run_python' does not run here.*uid map: Permission denied"):
        await check_sandbox(python_tool(str(broken)))


async def test_code_is_never_run_in_this_process_nor_outside_of_bubblewrap(open_dir: Path):
    fake, trace = open_dir / "bwrap", open_dir / "trace"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {trace}\ncat > {trace}.code\necho pretended\n')
    fake.chmod(0o755)
    result = await run_tool(python_tool(str(fake)), json.dumps({"code": f"open({str(open_dir / 'x')!r}, 'w')"}))
    assert (result.content, (open_dir / "x").exists()) == ("pretended\n", False)
    assert "--unshare-all" in trace.read_text() and "open(" in Path(f"{trace}.code").read_text()


def test_the_command_takes_away_all_that_code_could_reach():
    command = sandboxed_python("/usr/bin/bwrap", SandboxLimits(memory_bytes=12345))
    joined = " ".join(command)
    assert command[len(drop_root_command())] == "/usr/bin/bwrap"
    for part in ("--unshare-all", "--disable-userns", "--die-with-parent", "--new-session", "--clearenv"):
        assert part in command
    assert "--cap-drop ALL" in joined and "--tmpfs /tmp --remount-ro / --chdir /tmp" in joined
    assert not {"--bind", "--dev-bind", "--share-net", "--bind-try"} & set(command)
    seen = [command[place + 1] for place, word in enumerate(command) if word == "--ro-bind-try"]
    assert set(seen) <= {"/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives"} | {
        sys.base_prefix
    }
    first = command[-1]
    assert "'RLIMIT_AS': 12345" in first and "'RLIMIT_NPROC'" in first and "'RLIMIT_CPU'" in first
    compile(first, "first", "exec")


async def run(code: str, **limits: float) -> ToolResult:
    tool = python_tool(limits=SandboxLimits(**limits) if limits else None)
    return await run_tool(tool, json.dumps({"code": code}))


@needs_bwrap
async def test_code_runs_and_its_output_and_its_errors_come_back():
    await check_sandbox(python_tool())
    assert (await run("import math\nprint(math.factorial(20))")).content == "2432902008176640000\n"
    error = (await run("x = 1\nprint(1 / 0)")).error
    assert "status 1" in error and "line 2" in error and error.endswith("ZeroDivisionError: division by zero")


@needs_bwrap
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import socket; socket.create_connection(('1.1.1.1', 80), 2)", "Network is unreachable"),
        ("import socket; socket.create_connection(('127.0.0.1', 22), 2)", "Connection refused"),
        ("open('/usr/lib/x', 'w')", "Read-only file system"),
        ("open('/x', 'w')", "Read-only file system"),
        ("open('/dev/x', 'w')", "Read-only file system"),
        (f"open({__file__!r})", "No such file or directory"),
        ("open('/etc/passwd')", "No such file or directory"),
        ("x = 'x' * 10**9", "MemoryError"),
        ("import os\nfor _ in range(99): os.fork() or __import__('time').sleep(9)", "Resource temporarily unavailable"),
        ("open('/tmp/x', 'wb').write(bytes(2 * 10**7))", "No space left on device"),
        ("open('/dev/shm/x', 'wb').write(bytes(2 * 10**7))", "File too large"),
        ("import resource as r; r.setrlimit(r.RLIMIT_AS, (2**40, 2**40))", "not allowed to raise maximum limit"),
        ("import ctypes; print(ctypes.CDLL(None, use_errno=True).unshare(0x10000000)); exit(1)", "-1"),
        ("import os; print(sorted(os.environ)); exit(1)", "['HOME', 'LANG', 'PATH', 'PWD']"),
        ("import os; print(os.getppid() <= 2, os.getuid()); exit(1)", "True 65534"),
        ("import memory", "No module named 'memory'"),
        ("print('x' * 10**6)", "printed more than 100000 bytes"),
        ("while True: pass", "ended with status"),
    ],
)
async def test_what_code_tries_is_contained(code: str, said: str):
    result = await run(code, tmp_bytes=10**7, cpu_seconds=1)
    assert said in (result.error or ""), result


@needs_bwrap
async def test_code_that_never_ends_is_killed_with_its_children():
    forks = "import os, time\nos.fork()\ntime.sleep(1234)"
    tool = replace(python_tool(), timeout_seconds=1.5)
    assert "gave no result within 1.5 seconds" in (await run_tool(tool, json.dumps({"code": forks}))).error
    for _ in range(tool.max_concurrency):  # the last slot is released once the process is gone
        await tool.slots.acquire()
    cmdlines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in cmdlines if b"--disable-userns" in line]
