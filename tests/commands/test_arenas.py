"""The threads of a server share few malloc arenas. Tested in a separate process, as arenas are never freed."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import ctypes, threading
from runtime.cli.server_process import limit_arenas

limit_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes, libc.fflush.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
gate = threading.Barrier(9)

def take():
    libc.malloc(5000)
    gate.wait()
    gate.wait()

threads = [threading.Thread(target=take, daemon=True) for _ in range(8)]
for thread in threads:
    thread.start()
gate.wait()
out = libc.fdopen(1, b"w")
libc.malloc_info(0, out)
libc.fflush(out)
gate.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas to limit")
def test_threads_share_two_arenas():
    run = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    assert run.stdout.count("<heap nr=") == 2
