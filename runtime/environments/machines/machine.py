"""A task's machine: a Linux of its own in a sandbox made by bubblewrap, and the scripts that are run in it.

    server ── setpriv (only as root) ── bubblewrap: a bounded /tmp ── bubblewrap: /tmp becomes / ── supervisor.py

Programs see the host's programs and libraries in /usr, read-only, and otherwise files of the machine's own: /etc,
/root, /home, /var, /usr/local and /usr itself are writable and empty or basic. They see no network, no other process
and no environment variable of the host, and are called root there without any privilege here. Time, processor time,
memory, processes and disk are limited. The machine ends with its episode, and with the server.
Invariant: a script of a task or of a model runs in a machine only.
Hazards: the machine shares the host's kernel. A task's checks run in the machine that the model worked in; they find
the host's programs before those that it may have installed, but its files are what they read. Memory is limited for
each process, not for all together; the disk is memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from runtime.environments.machines.base_files import BASE_FILES, PRIVATE_FILES
from runtime.environments.machines.syscall_filter import make_filter
from runtime.errors import ToolError, ToolRefused
from runtime.tools.sandbox import SandboxLimits, describe_refusal, drop_root_command, find_bwrap

PYTHON = "/usr/bin/python3"
START_SECONDS = 30.0
SCRIPT_SECONDS = 90.0
"""One setup of AgentBench sleeps for a minute."""
COMMAND_SECONDS = 30.0
GRACE_SECONDS = 10.0
"""Added to the time of a script before the machine counts as lost."""
MAX_OUTPUT_BYTES = 2**16
# Many files: tasks of AgentBench write `echo 123321>/var/x`, which opens x as file number 123321.
LIMITS = SandboxLimits(cpu_seconds=60, memory_bytes=2**30, num_processes=128, tmp_bytes=2**28, num_files=2**18)
SYSTEM_DIRECTORIES = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
USR_DIRECTORIES = (*SYSTEM_DIRECTORIES, "libexec", "share", "include", "games")
OWN_DIRECTORIES = (
    *("/etc", "/home", "/media", "/mnt", "/opt", "/root", "/run", "/srv", "/tmp", "/usr", "/usr/local"),
    *("/usr/local/bin", "/usr/local/lib", "/usr/local/sbin", "/var", "/var/cache", "/var/lib", "/var/log"),
    *("/var/mail", "/var/tmp"),
)
_SYSTEM_PATH, _LOCAL_PATH = "/usr/sbin:/usr/bin:/sbin:/bin", "/usr/local/sbin:/usr/local/bin"
ENVIRONMENT = {
    "HOME": "/root",
    "USER": "root",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "PATH": f"{_LOCAL_PATH}:{_SYSTEM_PATH}",
}
# The host's programs first: a model may have installed others of the same names in /usr/local.
SCRIPT_PATH = f"{_SYSTEM_PATH}:{_LOCAL_PATH}"
# Reads its own text from the first line, so that `ps` in the machine shows one short line.
_BOOTSTRAP = "exec(eval(input()))"
_SUPERVISOR = Path(__file__).with_name("supervisor.py")


class Script(BaseModel, extra="forbid"):
    """A program of a task; it receives its arguments as any does."""

    language: Literal["bash", "python"] = "bash"
    code: str

    def command(self, arguments: Sequence[str], seed: int) -> list[str]:
        """Return the command that runs it; `$RANDOM` begins with `seed`."""
        if self.language == "python":
            # Without packages of /usr/local, where a model can write, but with `exit`, which comes with them.
            return [PYTHON, "-I", "-S", "-c", f"import site; site.setquit(); del site\n{self.code}", *arguments]
        return ["/bin/bash", "-c", f"RANDOM={seed}\n{self.code}", "--", *arguments]


class MachineSpec(BaseModel, extra="forbid"):
    """How a machine is before its task begins."""

    setup: list[Script] = []
    """Run one after the other, each on its own; all must succeed."""
    start: str = Field(default="", description="bash")
    """Evaluated in the shell that the model's commands are evaluated in: variables, a directory, programs."""


@dataclass(frozen=True)
class ScriptResult:
    """The end of a script: its exit status, not 0 where it took too long, and what it wrote."""

    status: int
    stdout: str
    stderr: str


class Machine:
    """The machine of one started task. It does one thing at a time."""

    def __init__(self, spec: MachineSpec, *, seed: int = 0, limits: SandboxLimits = LIMITS) -> None:
        self._spec = spec
        self._seed = seed
        self._limits = limits
        self._process: asyncio.subprocess.Process | None = None
        self._ids = itertools.count(1)
        self._turns = asyncio.Lock()

    async def start(self) -> None:
        """Start the machine and set it up as the task wants it.

        Raises:
            ToolRefused: bubblewrap cannot make it here, or the task's own scripts fail in it.
        """
        try:
            await self._open()
            for script in self._spec.setup:
                result = await self.run_script(script)
                if result.status != 0:
                    output = (result.stderr or result.stdout)[-500:].strip()
                    raise ToolRefused(f"the machine's setup ended with status {result.status}: {output}")
            if self._spec.start:
                await self.run_command(self._spec.start)
        except ToolError as error:
            await self.close()
            raise ToolRefused(f"the machine cannot be set up: {error}") from None
        except BaseException:
            await self.close()
            raise

    async def run_script(self, script: Script, *arguments: str) -> ScriptResult:
        """Run a script on its own, in /root and without the shell's variables.

        Raises:
            ToolError: the machine has stopped working.
        """
        argv = script.command([argument.replace("\0", "") for argument in arguments], self._seed)
        answer = await self._request({"argv": argv}, SCRIPT_SECONDS)
        late = f"it took more than {SCRIPT_SECONDS:g} seconds" if answer.get("is_late") else ""
        return ScriptResult(answer["status"], answer["stdout"], answer["stderr"] + late)

    async def run_command(self, command: str) -> str:
        """Evaluate a command in the shell and return what it wrote; directory and variables remain.

        Raises:
            ToolError: the machine has stopped working.
        """
        answer = await self._request({"command": command.replace("\0", "")}, COMMAND_SECONDS)
        notes = [answer["stdout"] + answer.get("stderr", "")]
        if answer.get("is_late"):
            notes.append(f"[the command was stopped after {COMMAND_SECONDS:g} seconds]")
        if not answer.get("has_shell", True):
            notes.append("[the shell ended; the next command has a new one, in /root]")
        return "\n".join(filter(None, notes))

    async def close(self) -> None:
        """End the machine with everything that runs in it."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # Its output ends when the last process of the sandbox has ended; those of the machine end with their first.
        await process.communicate()

    async def _open(self) -> None:
        with _write_filter() as filter_descriptor:
            command = machine_command(find_machine_bwrap(), self._limits, filter_descriptor)
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(filter_descriptor,),
                limit=32 * MAX_OUTPUT_BYTES,
            )
        settings = {
            "environment": ENVIRONMENT,
            "script_path": SCRIPT_PATH,
            "files": BASE_FILES,
            "private_files": PRIVATE_FILES,
            "limits": self._limits.as_rlimits(),
            "max_bytes": MAX_OUTPUT_BYTES,
        }
        source = repr(_SUPERVISOR.read_text(encoding="utf-8"))
        lines = f"{source}\n{json.dumps(settings)}\n"
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._exchange(lines, 0)
        except (ToolError, TimeoutError) as error:
            raise ToolRefused(
                f"a task's machine does not start here, bubblewrap says {str(error) or 'nothing'!r}: it needs version "
                "0.8 and user namespaces for this user (on Ubuntu, an AppArmor profile for bwrap)"
            ) from None

    async def _request(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        async with self._turns:
            number = next(self._ids)
            line = json.dumps({"id": number, "seconds": seconds, **request}) + "\n"
            try:
                async with asyncio.timeout(seconds + GRACE_SECONDS):
                    return await self._exchange(line, number)
            except TimeoutError:
                await self.close()
                raise ToolError("the machine has stopped working: it gives no answer") from None

    async def _exchange(self, text: str, number: int) -> dict[str, Any]:
        """Send lines; return the answer with this number. Answers of cancelled requests are passed over."""
        process = self._process
        if process is None:
            raise ToolError("the machine has stopped working")
        assert process.stdin is not None and process.stdout is not None
        output = ""
        with contextlib.suppress(ConnectionError):
            process.stdin.write(text.encode())
            await process.stdin.drain()
        while line := await process.stdout.readline():
            try:
                answer = json.loads(line)
            except ValueError:
                output += line.decode("utf-8", "replace")
                continue
            if answer["id"] == number:
                return answer
        raise ToolError(output[-1_000:].strip() or "the machine has stopped working")


def require_machines() -> None:
    """Raise ToolRefused, with the package's name, if no machine can be made here."""
    find_machine_bwrap()
    make_filter()


def find_machine_bwrap() -> str:
    """Return the path of bubblewrap. Raises: ToolRefused."""
    if not os.access(PYTHON, os.X_OK):
        raise ToolRefused(f"a task's machine needs {PYTHON}, which is missing: install it (apt install python3)")
    try:
        drop_root_command()
        return find_bwrap()
    except ToolRefused as refused:
        raise ToolRefused(describe_refusal(refused, "a task's machine")) from None


def machine_command(bwrap: str, limits: SandboxLimits, filter_descriptor: int) -> list[str]:
    """Return the command that starts a machine; its supervisor reads from standard input."""
    common = ("--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL")
    # The first one makes the machine's disk, a /tmp with a limit, which bubblewrap's own root does not have.
    disk = (*("--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"), "--size", str(limits.tmp_bytes))
    return [
        *drop_root_command(),
        *(bwrap, *common, *disk, "--tmpfs", "/tmp", "--chdir", "/", "--"),
        *(bwrap, *common, "--disable-userns", "--as-pid-1", "--seccomp", str(filter_descriptor)),
        # Over files of the machine alone: the kernel asks the owner's user namespace.
        *("--cap-add", "CAP_DAC_OVERRIDE", "--uid", "0", "--gid", "0", "--hostname", "machine", "--clearenv"),
        *("--bind", "/tmp", "/"),
        *(word for path in OWN_DIRECTORIES for word in ("--dir", path)),
        *_system_mounts(),
        *("--proc", "/proc", "--dev", "/dev", "--size", str(limits.tmp_bytes // 4), "--tmpfs", "/dev/shm"),
        *("--remount-ro", "/dev", "--chdir", "/root", "--"),
        *(PYTHON, "-I", "-S", "-B", "-c", _BOOTSTRAP),
    ]


def _system_mounts() -> list[str]:
    """Return the mounts of the host's programs and libraries. /usr itself belongs to the machine: tasks write there."""
    words: list[str] = []
    for name in USR_DIRECTORIES:
        path = Path("/usr", name)
        if path.is_symlink():
            words += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            words += ["--ro-bind", str(path), str(path)]
    for name in SYSTEM_DIRECTORIES:
        path = Path("/", name)
        if path.is_symlink():
            words += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            words += ["--ro-bind", str(path), str(path)]
    for path in ("/etc/alternatives", "/etc/ld.so.cache"):
        words += ["--ro-bind-try", path, path]
    return words


@contextlib.contextmanager
def _write_filter():
    """Yield a descriptor that the filter of system calls can be read from."""
    descriptor = os.memfd_create("filter")
    try:
        os.write(descriptor, make_filter())
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
