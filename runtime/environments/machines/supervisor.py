"""Runs inside of a task's machine as its first process, and runs scripts and commands there on request.

It reads one JSON request a line and writes one JSON answer a line. The first line is its settings.
Invariant: it holds no file of the host and imports the standard library only: its text is sent into the machine.
Hazard: everything in the machine has its user, so it must not be dumpable, or its pipes could be opened.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import shlex
import signal
import sys
import time
from typing import Any

PR_SET_DUMPABLE = 4
CONTROL = 9
"""The file descriptor at which the shell says that a command has ended."""
CHUNK_BYTES = 65_536
DRAIN_BYTES = 2**20
"""Read at most after the end of a command; a program in the background may write for ever."""
KILL_SECONDS = 2.0
CANNOT_RUN = 126

Answer = dict[str, Any]


def main() -> None:
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # what bubblewrap left open, the programs would inherit
    settings = json.loads(sys.stdin.readline())
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0)
    signal.signal(signal.SIGINT, lambda *_: None)  # the others do not reach the first process of a namespace
    for path, text in settings["files"].items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    for path in settings["private_files"]:
        os.chmod(path, 0o600)
    os.chmod("/tmp", 0o1777)
    for name, limit in settings["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        lower = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (lower, lower))
    supervisor = Supervisor(settings["environment"], settings["script_path"], settings["max_bytes"])
    send({"id": 0})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            send({"id": request["id"], **supervisor.handle(request)})
        except OSError as error:  # no process, no descriptor or no memory is left: the machine's own doing
            send({"id": request["id"], "status": CANNOT_RUN, "stdout": "", "stderr": str(error)})


def send(answer: Answer) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


class Supervisor:
    """Runs one thing at a time; the shell is kept from one command to the next."""

    def __init__(self, environment: dict[str, str], script_path: str, max_bytes: int) -> None:
        self._environment = environment
        self._script_path = script_path
        self._max_bytes = max_bytes
        self._shell: Shell | None = None

    def handle(self, request: Answer) -> Answer:
        reap()
        if "command" in request:
            return self._run_command(request["command"], request["seconds"])
        return self._run_script(request["argv"], request["seconds"])

    def _run_script(self, argv: list[str], seconds: float) -> Answer:
        """Run a program with an environment of its own; return its status and output."""
        os.chdir("/root")
        before, deadline = list_processes(), time.monotonic() + seconds
        environment = {**self._environment, "PATH": self._script_path}
        stdout, stderr = Output(self._max_bytes), Output(self._max_bytes)
        pid = spawn(argv, environment, {1: stdout.write_end, 2: stderr.write_end})
        exited = os.pidfd_open(pid)
        has_ended = read_until([stdout, stderr], [exited], deadline)
        if not has_ended:
            kill_since(before)
        os.close(exited)
        _, status = os.waitpid(pid, 0)
        texts = {"stdout": stdout.close(), "stderr": stderr.close()}
        return {"status": os.waitstatus_to_exitcode(status), "is_late": not has_ended, **texts}

    def _run_command(self, command: str, seconds: float) -> Answer:
        """Run a command in the shell; return its output, and whether the shell has ended with it."""
        if self._shell is None:
            os.chdir("/root")
            self._shell = Shell(self._environment)
        shell, deadline = self._shell, time.monotonic() + seconds
        before = list_processes()
        output = shell.begin(command, self._max_bytes)
        has_ended = read_until([output], shell.signals, deadline)
        if not has_ended:
            kill_since(before)
            if not read_until([output], shell.signals, time.monotonic() + KILL_SECONDS):
                os.kill(shell.pid, signal.SIGKILL)  # it is busy itself: `while true; do :; done`
                read_until([output], [shell.exited], time.monotonic() + KILL_SECONDS)
        if not shell.has_finished():
            shell.close()
            self._shell = None
        return {"stdout": output.text(), "is_late": not has_ended, "has_shell": self._shell is not None}


class Output:
    """A pipe, and the beginning of what was written to it."""

    def __init__(self, max_bytes: int, read_end: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.is_open = True
        self.content = bytearray()
        self.write_end = -1
        if read_end is None:
            read_end, self.write_end = os.pipe()
        self.read_end = read_end
        os.set_blocking(read_end, False)

    def read(self) -> int:
        """Read one piece; return its size, 0 where there is none."""
        try:
            chunk = os.read(self.read_end, CHUNK_BYTES)
        except BlockingIOError:
            return 0
        self.is_open = bool(chunk)
        self.content += chunk[: max(self.max_bytes - len(self.content), 0)]
        return len(chunk)

    def drain(self) -> None:
        num_bytes = 0
        while num_bytes < DRAIN_BYTES and (size := self.read()):
            num_bytes += size

    def text(self) -> str:
        return self.content.decode("utf-8", "replace")

    def close(self) -> str:
        os.close(self.read_end)
        return self.text()


class Shell:
    """A login shell that evaluates commands one after the other, so that its directory and variables remain."""

    def __init__(self, environment: dict[str, str]) -> None:
        stdin, self._stdin = os.pipe()
        self._stdout, stdout = os.pipe()
        self._control, control = os.pipe()
        self.pid = spawn(["/bin/bash", "--login"], environment, {0: stdin, 1: stdout, 2: stdout, CONTROL: control})
        self.exited = os.pidfd_open(self.pid)
        self.signals = [self._control, self.exited]

    def begin(self, command: str, max_bytes: int) -> Output:
        # Nothing from standard input: a command that reads would read the next commands.
        ending = f"builtin printf '%s\\n' \"$?\" >&{CONTROL}"
        text = f"builtin eval {shlex.quote(command)} </dev/null\n{ending}\n".encode("utf-8", "replace")
        try:
            while text:
                text = text[os.write(self._stdin, text) :]
        except BrokenPipeError:
            pass  # it was killed since the last command, which `signals` say
        return Output(max_bytes, self._stdout)

    def has_finished(self) -> bool:
        """Return whether the command has ended and the shell lives."""
        ready, _, _ = select.select(self.signals, [], [], 0)
        if self._control not in ready or self.exited in ready:
            return False
        return bool(os.read(self._control, CHUNK_BYTES))

    def close(self) -> None:
        for descriptor in (self._stdin, self._stdout, self._control, self.exited):
            os.close(descriptor)


def spawn(argv: list[str], environment: dict[str, str], descriptors: dict[int, int]) -> int:
    """Start a program with these descriptors, whose own copies are closed, and nothing else of this process."""
    actions: list[Any] = []
    if 0 not in descriptors:
        actions.append((os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0))
    actions += [(os.POSIX_SPAWN_DUP2, source, target) for target, source in sorted(descriptors.items())]
    try:
        return os.posix_spawn(argv[0], argv, environment, file_actions=actions, setsid=True)
    finally:
        for descriptor in set(descriptors.values()):
            os.close(descriptor)


def read_until(outputs: list[Output], signals: list[int], deadline: float) -> bool:
    """Read outputs until one of `signals` is readable; return False if the deadline comes first."""
    while True:
        by_descriptor = {output.read_end: output for output in outputs if output.is_open}
        left = max(deadline - time.monotonic(), 0.0)
        ready, _, _ = select.select([*by_descriptor, *signals], [], [], left)
        for descriptor in ready:
            if descriptor in by_descriptor:
                by_descriptor[descriptor].read()
        if set(ready) & set(signals):
            for output in outputs:
                output.drain()
            return True
        if not ready or left == 0.0:
            return False


def list_processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def kill_since(before: set[int]) -> None:
    """Kill all processes that are not in `before`; programs that the task had started live on."""
    for _ in range(50):  # more may be made in between
        since = [pid for pid in list_processes() - before if not is_zombie(pid)]
        if not since:
            return
        for pid in since:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)


def is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return True


def reap() -> None:
    """Forget processes whose parents ended before them; the shell is waited for here as well."""
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            continue
    except ChildProcessError:
        return


if __name__ == "__main__":
    main()
