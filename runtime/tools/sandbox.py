"""A tool that runs Python code in a sandbox made by bubblewrap.

The code sees the interpreter and the system's libraries, read-only, and an empty /tmp of its own; no network, no
process but its own, none of the server's files, no environment variable. Limits: time, processor time, memory, number
of processes, size of files, output.

Refuses to know what the code is for, and to run it any other way: without bubblewrap there is no such tool. The kernel
is shared: what escapes it escapes the sandbox.
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
# Runs inside, before the code does. Hard limits, and no capability to raise them again.
FIRST = """
import resource, sys
for name, most in {limits}.items():
    resource.setrlimit(getattr(resource, name), (most, most))
code = sys.stdin.read()
with open("/tmp/code.py", "w") as file:  # where a traceback finds its lines
    file.write(code)
exec(compile(code, "/tmp/code.py", "exec"), {{"__name__": "__main__"}})
"""


@dataclass(frozen=True)
class SandboxLimits:
    """What one run may take."""

    cpu_seconds: int = 8
    memory_bytes: int = 512 * 2**20
    """Of each process."""
    num_processes: int = 8
    """Threads count."""
    tmp_bytes: int = 64 * 2**20

    def as_rlimits(self) -> dict[str, int]:
        return {
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_NPROC": self.num_processes,
            "RLIMIT_FSIZE": self.tmp_bytes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        }


def python_tool(bwrap: str | None = None, limits: SandboxLimits | None = None) -> Tool:
    """Return the tool.

    Raises:
        ToolRefused: there is no bubblewrap here.
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
    """Return where bubblewrap is. Raises ToolRefused."""
    path = shutil.which("bwrap")
    if path is None:
        raise ToolRefused(
            "the tool 'run_python' needs bubblewrap, and no 'bwrap' is on the PATH: install it "
            "(apt install bubblewrap), or set tools.python = false"
        )
    return path


async def check_sandbox(tool: Tool) -> None:
    """Run something in the sandbox. Raises ToolRefused when it doesn't run: kernels may forbid it."""
    result = await run_tool(tool, json.dumps({"code": "print(6 * 7)"}))
    said = (result.error or result.content).strip()
    if said != "42":
        raise ToolRefused(
            f"the tool {tool.name!r} does not run here, bubblewrap says {said!r}: it needs version 0.8 and user "
            "namespaces for this user (on Ubuntu, an AppArmor profile for bwrap); or set tools.python = false"
        )


def sandboxed_python(bwrap: str, limits: SandboxLimits) -> list[str]:
    """Return the command that runs Python code from its standard input."""
    # Never the virtual environment's: its packages, ours among them, stay outside.
    own = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    interpreter = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    seen = SYSTEM if interpreter else (*SYSTEM, sys.base_prefix)
    return [
        *as_nobody(),
        bwrap,
        *(
            "--unshare-all",
            "--unshare-user",
            "--disable-userns",
            "--die-with-parent",
            "--new-session",
            "--cap-drop",
            "ALL",
        ),
        *("--uid", NOBODY, "--gid", NOBODY, "--hostname", "sandbox"),
        *("--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"),
        *(word for path in seen for word in ("--ro-bind-try", path, path)),
        *("--proc", "/proc", "--dev", "/dev"),
        # /dev comes with a /dev/shm as large as half of the memory.
        *("--size", str(limits.tmp_bytes), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),
        *("--size", str(limits.tmp_bytes), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp"),
        "--",
        *(interpreter or str(own), "-I", "-B", "-c", FIRST.format(limits=limits.as_rlimits())),
    ]


def as_nobody() -> list[str]:
    """Return what goes before the command when the server runs as root: in no sandbox is root harmless.

    Nor is it limited: the kernel doesn't count root's processes. Raises ToolRefused.
    """
    if os.geteuid() != 0:
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise ToolRefused(
            "the tool 'run_python' is never run as root, and no 'setpriv' is on the PATH to become somebody else: "
            "run the server as another user, install util-linux, or set tools.python = false"
        )
    return [setpriv, "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--"]


async def run_in_sandbox(command: list[str], code: str) -> str:
    """Run code to its end and return what it printed. Raises ToolError when it fails or prints too much.

    Whoever stops waiting kills it, with all its processes: they end with bubblewrap.
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    feeding = asyncio.ensure_future(_feed(process, code))
    try:
        output = await _read_at_most(process.stdout, MAX_OUTPUT_BYTES)
        text = output.decode("utf-8", "replace")
        if len(output) > MAX_OUTPUT_BYTES:
            raise ToolError(f"the code printed more than {MAX_OUTPUT_BYTES} bytes and was stopped: {text[:1_000]}...")
        status = await process.wait()
    finally:
        feeding.cancel()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()  # not wait(): it would wait for the end of output that nobody reads
    if status != 0:
        raise ToolError(f"the code ended with status {status}:\n{text[-1_500:].strip()}")
    return text


async def _feed(process: asyncio.subprocess.Process, code: str) -> None:
    with contextlib.suppress(ConnectionError):
        process.stdin.write(code.encode("utf-8", "replace"))
        await process.stdin.drain()
        process.stdin.close()


async def _read_at_most(stream: asyncio.StreamReader, max_bytes: int) -> bytes:
    """Read to the end, or until there is more than `max_bytes`."""
    read = bytearray()
    while len(read) <= max_bytes and (chunk := await stream.read(65_536)):
        read += chunk
    return bytes(read)
