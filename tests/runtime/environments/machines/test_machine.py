"""A task's machine: its features, and that nothing in it reaches the host or outlives its episode."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.environments.machines import machine as machines
from runtime.environments.machines.machine import LIMITS, Machine, MachineSpec, Script, machine_command
from runtime.environments.machines.syscall_filter import make_filter
from runtime.errors import ToolError, ToolRefused
from runtime.tools.sandbox import SandboxLimits
from tests.support.machines import needs_machine
from tests.support.waiting import eventually


@asynccontextmanager
async def started(
    *setup: str, start: str = "", seed: int = 0, limits: SandboxLimits = LIMITS
) -> AsyncIterator[Machine]:
    machine = Machine(MachineSpec(setup=[Script(code=code) for code in setup], start=start), seed=seed, limits=limits)
    await machine.start()
    try:
        yield machine
    finally:
        await machine.close()


@needs_machine
async def test_the_shell_keeps_its_directory_its_variables_and_its_programs():
    async with started("mkdir /srv/x", start="number=3; sleep 1000 & cd /srv/x") as machine:
        assert await machine.run_command("pwd; echo $number; jobs -r | wc -l") == "/srv/x\n3\n1\n"
        await machine.run_command("cd /tmp; number=4; f() { echo of mine; }; export WORD='a b'")
        assert await machine.run_command("pwd; echo $number $WORD; f") == "/tmp\n4 a b\nof mine\n"


@needs_machine
async def test_a_script_has_an_environment_of_its_own_and_its_arguments():
    async with started(start="cd /tmp; number=3") as machine:
        result = await machine.run_script(Script(code='pwd; echo "$number|$1|$2"; exit 4'), "a 'b", "\0c\n")
        assert (result.status, result.stdout, result.stderr) == (4, "/root\n|a 'b|c\n\n", "")
        python = Script(language="python", code="from sys import *; print(argv[1:]); print('no', file=stderr); exit(3)")
        result = await machine.run_script(python, "x")
        assert (result.status, result.stdout, result.stderr) == (3, "['x']\n", "no\n")


@needs_machine
async def test_users_groups_owners_and_su_work_as_far_as_tasks_use_them():
    setup = (
        "useradd -m -s /bin/bash -G root,sudo eve && cd /home/eve && touch a && chmod 000 a && chown eve a && su - eve"
    )
    async with started(setup) as machine:
        assert await machine.run_command("id -un; groups eve; getent passwd eve") == (
            "root\neve : eve root sudo\neve:x:1001:1001::/home/eve:/bin/bash\n"
        )
        assert "# Read by" in await machine.run_command("cat /home/eve/.bashrc; cat /home/eve/a")


@needs_machine
async def test_a_command_that_takes_too_long_is_stopped_and_programs_of_before_live_on(monkeypatch):
    monkeypatch.setattr(machines, "COMMAND_SECONDS", 1.0)
    async with started(start="sleep 1000 & cd /tmp") as machine:
        output = await machine.run_command("echo begun; (setsid sleep 2000 &); sleep 3000")
        assert output.startswith("begun\n") and output.endswith("[the command was stopped after 1 seconds]")
        assert await machine.run_command("pwd; ps -o args= -C sleep") == "/tmp\nsleep 1000\n"


@needs_machine
async def test_a_shell_that_is_busy_or_ends_is_replaced(monkeypatch):
    monkeypatch.setattr(machines, "COMMAND_SECONDS", 0.5)
    new = "[the shell ended; the next command has a new one, in /root]"
    async with started(start="cd /tmp") as machine:
        assert (await machine.run_command("while true; do :; done")).endswith(new)
        assert await machine.run_command("pwd; cd /srv") == "/root\n"
        assert await machine.run_command("echo last; exit 3") == f"last\n\n{new}"
        assert await machine.run_command("pwd; kill -9 $$") == f"/root\n\n{new}"
        assert await machine.run_command("pwd") == "/root\n"


@needs_machine
async def test_commands_that_read_or_are_no_bash_disturb_no_later_one():
    async with started() as machine:
        assert await machine.run_command("cat; echo $?") == "0\n"
        assert "unexpected" in await machine.run_command("if true; then (")
        assert "unexpected EOF" in await machine.run_command("echo 'open")
        assert await machine.run_command("cat <<'E'\nit's $HOME\nE\n# end") == "it's $HOME\n"
        assert await machine.run_command("exec > /dev/null; cd /tmp") == ""
        assert (
            await machine.run_command("printf() { builtin echo mine; }; eval() { builtin echo mine; }; echo a >&2")
            == "a\n"
        )


@needs_machine
async def test_output_is_bounded_and_a_program_in_the_background_stops_nothing():
    async with started() as machine:
        assert len(await machine.run_command("yes | head -c 10000000")) == machines.MAX_OUTPUT_BYTES
        assert len(await machine.run_command("yes &")) <= machines.MAX_OUTPUT_BYTES
        await machine.run_command("kill %1; sleep 0.2")
        result = await machine.run_script(Script(code="sleep 1000 & echo done"))
        assert (result.status, result.stdout) == (0, "done\n")


@needs_machine
async def test_the_same_task_begins_in_the_same_state():
    setup = "for n in {1..9}; do echo $RANDOM >> /root/numbers; done"
    outputs = []
    for seed in (7, 7, 8):
        async with started(setup, seed=seed) as machine:
            outputs.append(await machine.run_command("cat numbers; find / -xdev -not -path '/root/*' | sort | md5sum"))
    assert outputs[0] == outputs[1] != outputs[2]


@needs_machine
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cat " + __file__, "No such file or directory"),
        ("ls -d " + str(Path(__file__).parents[4]), "No such file or directory"),
        ("ls -A /home/ /root/ | grep -v '^\\.'", "/home/:\nubuntu\n\n/root/:\n"),
        ("ls -A /mnt /media /srv /opt /usr/local/bin /run", "/media:\n\n/mnt:\n\n/opt:\n\n/run:\n\n/srv:\n"),
        ("grep -c . /etc/hosts; hostname", "1\nmachine\n"),
        ("ls /proc/*/root/work /proc/1/root", "Permission denied"),
        ("ls /sys /boot /dev/vda /dev/sda /dev/mem", "cannot access"),
        ("env -i bash -c 'echo $MACHINE_SECRET'; cat /proc/*/environ | tr '\\0' '\\n' | grep MACHINE_SECRET", "\n"),
        ("echo > /dev/tcp/1.1.1.1/80", "Network is unreachable"),
        ("echo > /dev/tcp/127.0.0.1/22", "Connection refused"),
        ("ip -o link 2>/dev/null | wc -l; tail -n +3 /proc/net/dev | wc -l", "1\n"),
        ("ps -e -o pid= -o comm= | grep -vE ' (ps|bash|grep|python3)$'; echo $?", "1\n"),
        ("kill -9 HOST_PID", "No such process"),
        ("touch /usr/bin/x /usr/lib/x /usr/share/x", "Read-only file system"),
        ("chmod u+s /usr/bin/find", "Read-only file system"),
        ("rm -rf /usr/bin/env; ls /usr/bin/env", "/usr/bin/env\n"),
        ("touch /dev/x", "Read-only file system"),
        ("mknod /root/disk b 8 0", "Operation not permitted"),
        ("mount -t tmpfs x /mnt; umount /usr/bin", "permission denied"),
        ("unshare --user --map-root-user id", "Operation not permitted"),
        ("nsenter -t 1 -a id || echo refused", "refused\n"),
        ("echo 1 > /proc/sys/kernel/panic || echo refused", "refused\n"),
        ("cat /proc/1/environ", "Permission denied"),
        ("echo forged > /proc/1/fd/1", "Permission denied"),
        ("cat /etc/shadow | wc -l; ls -l /etc/shadow | cut -c1-10", "-rw-------\n"),
        ("ls /proc/self/fd | sort -n | tail -1", "9\n"),
        ("python3 -c 'print(len(bytes(3 * 2**30)))'", "MemoryError"),
        ("ulimit -u unlimited; ulimit -v unlimited", "Operation not permitted"),
        ("head -c 99M /dev/zero > /root/big; rm /root/big", "No space left on device"),
        ("head -c 99M /dev/zero > /dev/shm/big", "No space left on device"),
        ("python3 -c 'import ctypes; print(ctypes.CDLL(None).ptrace(16, 1, 0, 0))'", "-1\n"),
    ],
)
async def test_nothing_of_the_host_is_reached(command: str, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MACHINE_SECRET", "of the host")
    async with started(limits=replace(LIMITS, tmp_bytes=2**25)) as machine:
        # Replaced here, not in the parameters: all workers must collect the same tests.
        output = await machine.run_command(command.replace("HOST_PID", str(os.getpid())))
        assert said in output and "of the host" not in output, output
        assert await machine.run_command("echo alive") == "alive\n"


@needs_machine
async def test_a_bomb_of_processes_harms_its_machine_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machines, "COMMAND_SECONDS", 2.0)
    async with started() as other, started() as machine:
        bombing = asyncio.ensure_future(machine.run_command("explode() { explode | explode & }; explode; sleep 100"))
        await asyncio.sleep(1)
        assert await other.run_command("for n in {1..20}; do sleep 0 & done; wait; echo fine") == "fine\n"
        await bombing
    assert not find_processes("explode")


def find_processes(*words: str) -> list[str]:
    """Return the command lines of this host's processes that contain one of the words."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:
            continue
    return [line for line in lines if any(word in line for word in words)]


def wait_until_there(word: str) -> list[str]:
    """Wait for a background program to start: before that it has no command line of its own."""
    eventually(lambda: bool(find_processes(word)))
    return find_processes(word)


def wait_until_gone(word: str) -> list[str]:
    eventually(lambda: not find_processes(word))
    return find_processes(word)


@needs_machine
async def test_nothing_outlives_the_machine():
    async with started(start="nohup setsid sleep 86401 > /dev/null 2>&1 &") as machine:
        await machine.run_command("(setsid nohup sh -c 'trap \"\" TERM HUP; sleep 86401; sleep 86401' &) ; disown -a")
        assert wait_until_there("sleep 86401")
    assert wait_until_gone("sleep 86401") == []


SERVER = """
import asyncio
from runtime.environments.machines.machine import Machine, MachineSpec

async def main():
    machine = Machine(MachineSpec(start="setsid sleep 86402 &"))
    await machine.start()
    print("started", flush=True)
    await asyncio.sleep(100)

asyncio.run(main())
"""


@needs_machine
def test_nothing_outlives_a_server_that_is_killed():
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    with server:
        assert server.stdout.readline() == "started\n"
        assert wait_until_there("sleep 86402")
        server.send_signal(signal.SIGKILL)
        # Not `communicate`: the machine has inherited the pipe.
        server.wait()
    assert wait_until_gone("sleep 86402") == []


@needs_machine
async def test_an_answer_to_a_request_that_was_given_up_is_no_answer_to_the_next():
    async with started() as machine:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await machine.run_command("sleep 1; echo first")
        assert await machine.run_command("echo second") == "second\n"


@needs_machine
async def test_a_machine_that_is_broken_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machines, "GRACE_SECONDS", 0.5)
    async with started() as machine:
        assert machine._process is not None
        machine._process.kill()
        # It may answer until the kernel has ended its processes.
        assert machine._process.stdout is not None and await machine._process.stdout.read() == b""
        with pytest.raises(ToolError, match="the machine has stopped working"):
            await machine.run_command("echo 1")
        await machine.close()
        with pytest.raises(ToolError, match="the machine has stopped working"):
            await machine.run_script(Script(code="echo 1"))


@needs_machine
async def test_a_setup_that_fails_starts_no_task_and_leaves_nothing():
    machine = Machine(MachineSpec(setup=[Script(code="sleep 86403 & echo no such thing >&2; exit 5")]))
    with pytest.raises(ToolRefused, match="the machine's setup ended with status 5: no such thing"):
        await machine.start()
    assert wait_until_gone("sleep 86403") == []


async def test_without_bubblewrap_its_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machines, "PYTHON", sys.executable)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **more: None if name == "bwrap" else which(name, **more))
    with pytest.raises(ToolRefused, match=r"a task's machine needs bubblewrap.*apt install bubblewrap\)$"):
        await Machine(MachineSpec()).start()
    monkeypatch.setattr(machines, "PYTHON", "/nowhere/python3")
    with pytest.raises(ToolRefused, match=r"needs /nowhere/python3, which is missing.*apt install python3"):
        machines.require_machines()


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A world-writable directory: if the tests run as root, bubblewrap runs as `nobody`."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


async def test_a_bubblewrap_that_does_not_work_is_refused_with_its_words(open_dir: Path, monkeypatch):
    broken = open_dir / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied'\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(machines, "find_machine_bwrap", lambda: str(broken))
    with pytest.raises(
        ToolRefused, match="does not start here, bubblewrap says 'bwrap: setting up uid map: Permission"
    ):
        await Machine(MachineSpec()).start()


def test_the_command_takes_away_all_that_a_program_could_reach():
    command = machine_command("/usr/bin/bwrap", LIMITS, 17)
    inner = command[command.index("/usr/bin/bwrap", command.index("/usr/bin/bwrap") + 1) :]
    for part in ("--unshare-all", "--disable-userns", "--die-with-parent", "--new-session", "--clearenv", "--seccomp"):
        assert part in inner
    joined = " ".join(inner)
    assert "--cap-drop ALL" in joined and inner.count("--cap-add") == 1 and "--share-net" not in joined
    assert [inner[n + 1 : n + 3] for n, word in enumerate(inner) if word == "--bind"] == [["/tmp", "/"]]
    seen = {inner[n + 1] for n, word in enumerate(inner) if word.startswith("--ro-bind")}
    usual = {f"/{name}" for name in machines.SYSTEM_DIRECTORIES} | {f"/usr/{name}" for name in machines.USR_DIRECTORIES}
    assert seen <= usual | {"/etc/ld.so.cache", "/etc/alternatives"}


def test_a_processor_whose_calls_are_unknown_is_refused(monkeypatch: pytest.MonkeyPatch):
    assert len(make_filter()) % 8 == 0
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ToolRefused, match="runs on x86_64 and aarch64, and this processor is 'riscv64'"):
        make_filter()
