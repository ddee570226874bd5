"""A private disk for a process: small, full or read-only.

Other processes are not affected: the mount is in a namespace of this process and ends with it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
BUSY_SECONDS = 10.0  # threads may still be closing files
MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 1, 32, 16384, 1 << 18
LIBC = ctypes.CDLL(None, use_errno=True)


def mount_disk(at: Path, num_bytes: int) -> None:
    """Mount an empty disk of this size for this process alone, which must be single-threaded.

    Raises: OSError if that is not permitted.
    """
    _enter_namespace()
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("none", str(at), "tmpfs", 0, f"size={num_bytes}")


def make_read_only(at: Path) -> None:
    """Remount a disk read-only, as soon as no file on it is open for writing."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return _mount("none", str(at), "tmpfs", MS_REMOUNT | MS_RDONLY)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def fill(at: Path) -> Path:
    """Fill the disk to the last byte; deleting the returned file frees it again."""
    filler = at / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**16, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


def _enter_namespace() -> None:
    user, group = os.getuid(), os.getgid()
    if LIBC.unshare(CLONE_NEWNS) == 0:
        return
    _check(LIBC.unshare(CLONE_NEWNS | CLONE_NEWUSER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    kind_bytes = None if kind is None else kind.encode()
    _check(LIBC.mount(source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), options.encode()))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
