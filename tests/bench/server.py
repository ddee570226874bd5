"""Our server as users start it, `serve.py serve`, for one benchmark, and a client with little overhead.

Its data directory is deleted at the end. It is under `TMPDIR`, which should be on a disk with an honest `fsync`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
START_SECONDS = 180.0
SETTLE_SECONDS = 60.0
IDLE_SHARE = 0.1
KEEP_ALIVE_SECONDS = 3.0
"""Servers close idle connections: uvicorn after five seconds."""


class Process:
    """A server in its own process, its output in a file; ready when `path` answers 200."""

    def __init__(
        self, command: list[str], url: str, path: str, *, cwd: Path = ROOT, env: dict[str, str] | None = None
    ) -> None:
        self.url = url
        self.started_at = time.monotonic()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, cwd=cwd, env=env)
        self.pid = self._process.pid
        try:
            self._wait_until_ready(path)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - self.started_at

    def settle(self) -> Process:
        """Wait until the process is idle: servers go on loading after they are ready."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            began = cpu_seconds(self.pid)
            time.sleep(1.0)
            if cpu_seconds(self.pid) - began < IDLE_SHARE:
                break
        return self

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _wait_until_ready(self, path: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.url + path, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self._log.seek(0)
        raise RuntimeError(f"no server at {self.url}: {self._log.read()[-2_000:].decode(errors='replace')}")


class OurServer:
    """`with OurServer("--engine.url", URL) as server: server.url`; of another checkout where `root` names one.

    Its data are deleted at the end, unless they lie in `data`.
    """

    def __init__(self, *arguments: str, root: Path = ROOT, data: Path | None = None) -> None:
        self._arguments, self._root, self._data = arguments, root, data

    def __enter__(self) -> Process:
        with contextlib.ExitStack() as stack:
            data = self._data or stack.enter_context(tempfile.TemporaryDirectory(prefix="ratchet-bench-"))
            url = f"http://127.0.0.1:{free_port()}"
            command = [sys.executable, "serve.py", "serve", "--port", url.rpartition(":")[2], "--data", str(data)]
            model = [] if {"--engine.url", "--engine.model"} & set(self._arguments) else ["--engine.model", "pocket"]
            process = Process([*command, *model, *self._arguments], url, "/readyz", cwd=self._root)
            stack.callback(process.stop)
            self._stack = stack.pop_all()
        return process

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def end_in_order() -> None:
    """Turn a SIGTERM (`timeout` sends one) into an exception, so that no child process is left behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def cpu_seconds(pid: int) -> float:
    """Return the processor time that all threads of a process have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """Return a free port of the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Client:
    """Posts JSON to one server over keep-alive connections, in 60 µs where aiohttp takes 300."""

    def __init__(self, url: str, path: str, headers: dict[str, str] | None = None) -> None:
        place = urlsplit(url)
        self._host, self._port = place.hostname, place.port
        given = {"Host": place.netloc, "Content-Type": "application/json", **(headers or {})}
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
        self._head = "\r\n".join(lines).encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []
        """Idle connections, with the time of their last use."""

    async def post(self, body: bytes) -> bytes:
        """Return the body of the answer. Raises: RuntimeError for any status but 200 and 201."""
        reader, writer = await self._connect()
        try:
            writer.write(b"%b\r\nContent-Length: %d\r\n\r\n%b" % (self._head, len(body), body))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            answer = await reader.readexactly(length)
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer, time.monotonic()))
        if not head.startswith((b"http/1.1 200", b"http/1.1 201")):
            raise RuntimeError(answer[:300].decode(errors="replace"))
        return answer

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer, used_at = self._idle.pop()
            if time.monotonic() - used_at < KEEP_ALIVE_SECONDS:
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)

    def close(self) -> None:
        for _, writer, _ in self._idle:
            writer.close()
        self._idle.clear()


def dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()
