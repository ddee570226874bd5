"""The tool `run_python`, which runs Python code in a sandbox made by bubblewrap.

The code sees the interpreter and the system's libraries, read-only, and an empty /tmp of its own. It sees no network,
no other processes, no files of the server and no environment variables. Time, processor time, memory, processes, file
sizes and output are limited.
Invariant: code never runs outside the sandbox; without bubblewrap the tool is not offered.
Hazard: the sandbox shares the host's kernel; an exploit of the kernel escapes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import ToolError, ToolRefused
from runtime.tools.base import Tool, run_tool
from runtime.tools.functions import tool_from_function

SOURCE = "tools.python"
TIMEOUT_SECONDS = 10.0
MAX_OUTPUT_BYTES = 100_000
NOBODY = "65534"
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
# Runs inside the sandbox before the code: sets hard limits, which the code has no capability to raise.
BOOTSTRAP = """
import resource, sys
for name, limit in {limits}.items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
code = sys.stdin.read()
with open("/tmp/code.py", "w") as file:  # tracebacks quote lines of this file
    file.write(code)
exec(compile(code, "/tmp/code.py", "exec"), {{"__name__": "__main__"}})
"""


@dataclass(frozen=True)
class SandboxLimits:
    """Resource limits of one run."""

    cpu_seconds: int = 8
    memory_bytes: int = 512 * 2**20
    """Of each process."""
    num_processes: int = 8
    """Including threads."""
    tmp_bytes: int = 64 * 2**20
    num_files: int = 64
    """Open at the same time, by each process."""

    def as_rlimits(self) -> dict[str, int]:
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_NPROC": self.num_processes,
            "RLIMIT_FSIZE": self.tmp_bytes,
            "RLIMIT_NOFILE": self.num_files,
            "RLIMIT_CORE": 0,
        }


def python_tool(bwrap: str | None = None, limits: SandboxLimits | None = None) -> Tool:
    """Return the tool `run_python`.

    Raises:
        ToolRefused: bubblewrap is not installed.
    """
    bwrap = bwrap or find_bwrap()
    command = sandboxed_python(bwrap, limits or SandboxLimits())

    async def run_python(code: str) -> str:
        """Run Python code and return what it prints. Standard library only; no network; nothing is kept between runs.

        Args:
            code: a whole program; print what you want to see
        """
        return await run_in_sandbox(command, code)

    return tool_from_function(run_python, timeout_seconds=TIMEOUT_SECONDS, max_concurrency=2, source=SOURCE)


def find_bwrap() -> str:
    """Return the path of bubblewrap. Raises: ToolRefused."""
    path = shutil.which("bwrap")
    if path is None:
        raise ToolRefused(
            "the tool 'run_python' needs bubblewrap, and no 'bwrap' is on the PATH: install it "
            "(apt install bubblewrap), or set tools.python = false"
        )
    return path


def describe_refusal(refused: ToolRefused, needed_by: str) -> str:
    """Return the reason of a refusal in the words of another user of the sandbox than the tool."""
    reason = str(refused).replace("the tool 'run_python'", needed_by)
    return reason.replace(", or set tools.python = false", "")


async def check_sandbox(tool: Tool) -> None:
    """Run a small program in the sandbox. Raises: ToolRefused if it fails, for instance because the kernel forbids
    it."""
    result = await run_tool(tool, json.dumps({"code": "print(6 * 7)"}))
    output = (result.error or result.content).strip()
    if output != "42":
        raise ToolRefused(
            f"the tool {tool.name!r} does not run here, bubblewrap says {output!r}: it needs version 0.8 and user "
            "namespaces for this user (on Ubuntu, an AppArmor profile for bwrap); or set tools.python = false"
        )


def sandboxed_python(bwrap: str, limits: SandboxLimits) -> list[str]:
    """Return the command that runs Python code from its standard input in the sandbox."""
    # Never the virtual environment's interpreter: its packages and this project must stay outside.
    own = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    interpreter = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    readable = SYSTEM if interpreter else (*SYSTEM, sys.base_prefix)
    return [
        *drop_root_command(),
        bwrap,
        *(
            "--unshare-all",
            # Named too: --unshare-all only tries to get a user namespace, and --disable-userns needs one.
            "--unshare-user",
            "--disable-userns",
            "--die-with-parent",
            "--new-session",  # otherwise code could type into the server's terminal (TIOCSTI)
            "--cap-drop",
            "ALL",
        ),
        *("--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"),
        *("--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"),
        # Order: bubblewrap mounts in the order of its arguments, and nothing after the root was made read-only.
        *(word for path in readable for word in ("--ro-bind-try", path, path)),
        *("--proc", "/proc", "--dev", "/dev"),
        # bubblewrap's /dev has a /dev/shm of up to half of the memory; this limits it.
        *("--size", str(limits.tmp_bytes), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),
        *("--size", str(limits.tmp_bytes), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"),
        "--",
        *(interpreter or str(own), "-I", "-B", "-c", BOOTSTRAP.format(limits=limits.as_rlimits())),
    ]


def drop_root_command() -> list[str]:
    """Return the command prefix that gives up root; empty if the server does not run as root.

    Root would be dangerous inside the sandbox too.

    Raises:
        ToolRefused: the server runs as root and `setpriv` is not installed.
    """
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise ToolRefused(
            "the tool 'run_python' is never run as root, and no 'setpriv' is on the PATH to become somebody else: "
            "run the server as another user, install util-linux, or set tools.python = false"
        )
    # The kernel does not apply RLIMIT_NPROC to root: as root a fork bomb would run.
    return [setpriv, "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--"]


async def run_in_sandbox(command: list[str], code: str) -> str:
    """Run code and return its output. Cancellation kills the code with all its processes, which end with bubblewrap.

    Raises:
        ToolError: the code fails or prints more than `MAX_OUTPUT_BYTES`.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert process.stdin is not None and process.stdout is not None
    writing = asyncio.ensure_future(_write_code(process.stdin, code))
    try:
        output = await _read_at_most(process.stdout, MAX_OUTPUT_BYTES)
        text = output.decode("utf-8", "replace")
        if len(output) > MAX_OUTPUT_BYTES:
            raise ToolError(f"the code printed more than {MAX_OUTPUT_BYTES} bytes and was stopped: {text[:1_000]}...")
        status = await process.wait()
    finally:
        writing.cancel()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()  # not wait(): it waits forever if unread output fills the pipe
    if status != 0:
        raise ToolError(f"the code ended with status {status}:\n{text[-1_500:].strip()}")
    return text


async def _write_code(stdin: asyncio.StreamWriter, code: str) -> None:
    with contextlib.suppress(ConnectionError):
        stdin.write(code.encode("utf-8", "replace"))
        await stdin.drain()
        stdin.close()


async def _read_at_most(stream: asyncio.StreamReader, max_bytes: int) -> bytes:
    """Read to the end of the stream, or until more than `max_bytes` have arrived."""
    output = bytearray()
    while len(output) <= max_bytes and (chunk := await stream.read(65_536)):
        output += chunk
    return bytes(output)
