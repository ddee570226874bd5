"""A PostgreSQL cluster for the tests, in a temporary directory and on a socket there, deleted after them.

Its programs are Debian's or any others that are installed. It listens on no network address, and ends by itself after
an hour if it was not stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import SQLModel

from memory.storage.database import Database

MAX_SECONDS = 3600
START_SECONDS = 60
USER = "ratchet"
MEMORY_DISK = Path("/dev/shm")
MIN_FREE_BYTES = 2 * 1024**3


def find_programs() -> Path | None:
    """Return the directory of the newest installed server's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


def find_obstacle() -> str | None:
    """Return the reason why no server can be started here, or None."""
    if find_programs() is None:
        return "the storage tests ran on SQLite alone: PostgreSQL is not installed (there is no initdb)"
    return None


OBSTACLE = find_obstacle()
HOMES = ["sqlite"] if OBSTACLE else ["sqlite", "postgresql"]


def skip_without_postgresql() -> None:
    """Skip the rest of a module, with the reason, if no server can be started."""
    if OBSTACLE:
        pytest.skip(OBSTACLE, allow_module_level=True)


class Cluster:
    """One server. Make it with `start_cluster`, and stop it."""

    def __init__(self, programs: Path, home: Path) -> None:
        self.home = home
        self._programs = programs
        self._server: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [shutil.which("timeout"), "--signal=INT", str(MAX_SECONDS), self._programs / "postgres"]
        with (self.home / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [*command, "-D", self.home / "data"], stdout=log, stderr=log, cwd=self.home, **_somebody()
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((self.home / "log").read_text())
            time.sleep(0.02)

    def stop(self, *, is_crash: bool = False) -> None:
        """Stop the server in order, or as a crash does, without writing its buffers."""
        if self._server is not None:
            os.kill(self._postmaster(), signal.SIGQUIT if is_crash else signal.SIGINT)
            self._server.wait(30)
            self._server = None

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://{USER}@/{database}?host={self.home}"

    def create_database(self, *, template: str = "template0") -> str:
        """Create a database, a copy of `template`, and return its name."""
        name = f"ratchet_{next(self._numbers)}"
        self.run_sql("postgres", f"CREATE DATABASE {name} TEMPLATE {template} ENCODING 'UTF8'")
        return name

    def run_sql(self, database: str, *statements: str) -> list[tuple]:
        """Run statements, each by itself, and return the rows of the last one."""
        import psycopg

        with psycopg.connect(host=str(self.home), user=USER, dbname=database, autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _answers(self) -> bool:
        ready = [self._programs / "pg_isready", "-q", "-h", self.home]
        return subprocess.run(ready, check=False).returncode == 0

    def _postmaster(self) -> int:
        return int((self.home / "data" / "postmaster.pid").read_text().split()[0])


class Databases:
    """A pool of databases of one cluster, emptied between uses, which is quicker than creating them."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._free: list[str] = []
        self._pattern = cluster.create_database()
        Database(cluster.url(self._pattern)).close()

    @contextlib.contextmanager
    def lend(self) -> Iterator[str]:
        """Yield the URL of a database with empty tables."""
        name = self._free.pop() if self._free else self._cluster.create_database(template=self._pattern)
        yield self._cluster.url(name)
        tables = ", ".join(SQLModel.metadata.tables)
        self._cluster.run_sql(name, "SET lock_timeout = '5s'", f"TRUNCATE {tables} RESTART IDENTITY")
        self._free.append(name)


def start_cluster() -> Iterator[Cluster]:
    """Yield a new server; for a fixture."""
    programs = find_programs()
    home = Path(tempfile.mkdtemp(prefix="ratchet-postgresql-", dir=_find_quick_place()))
    try:
        if somebody := _somebody():
            shutil.chown(home, somebody["user"])
        options = ("--encoding=UTF8", "--locale=C", "--auth=trust", "--no-sync")
        subprocess.run(
            [programs / "initdb", "-D", home / "data", "-U", USER, *options],
            check=True,
            capture_output=True,
            cwd=home,
            **somebody,
        )
        with (home / "data" / "postgresql.conf").open("a") as settings:
            settings.write(f"listen_addresses = ''\nunix_socket_directories = '{home}'\nshared_buffers = 32MB\n")
        cluster = Cluster(programs, home)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop(is_crash=True)  # its data are deleted, so nothing need be flushed
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _find_quick_place() -> Path | None:
    """Return the memory disk, where fsync is free, if there is space: the tests commit thousands of times."""
    is_roomy = MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free > MIN_FREE_BYTES
    return MEMORY_DISK if is_roomy and os.access(MEMORY_DISK, os.W_OK) else None


def _somebody() -> dict[str, Any]:
    """Return the user of the server's process, for `subprocess`: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    users = {user.pw_name: user for user in pwd.getpwall()}
    somebody = users.get("postgres") or users["nobody"]
    return {"user": somebody.pw_name, "group": somebody.pw_gid, "extra_groups": []}
