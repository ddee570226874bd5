"""The GPUs of this machine, listed by `nvidia-smi`. Hazard: asking PyTorch instead would allocate memory on each
GPU."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

log = structlog.get_logger()

MIB = 2**20
QUERY = ("--query-gpu=index,uuid,memory.total,memory.free,name", "--format=csv,noheader,nounits")
QUERY_SECONDS = 20


@dataclass(frozen=True)
class Gpu:
    """One GPU. `index` is nvidia-smi's, which equals CUDA's only if CUDA_DEVICE_ORDER is PCI_BUS_ID."""

    index: str
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int


def list_gpus() -> list[Gpu]:
    """Return the GPUs that PyTorch can use; none without a driver or with PyTorch's CPU build. Blocks: call it in a
    thread."""
    tool = shutil.which("nvidia-smi")
    # A GPU that PyTorch's build cannot use must not appear: the trainer would be sent to it.
    if tool is None or importlib.metadata.version("torch").endswith("+cpu"):
        return []
    try:
        output = subprocess.run(
            [tool, *QUERY], capture_output=True, text=True, timeout=QUERY_SECONDS, check=True
        ).stdout
    except (subprocess.SubprocessError, OSError) as error:
        log.warning("nvidia-smi fails: no GPU is known", error=str(error))
        return []
    return parse_gpus(output)


def parse_gpus(output: str) -> list[Gpu]:
    """Return the GPUs in nvidia-smi's output for `QUERY`, without those that report no memory."""
    gpus = []
    for line in output.splitlines():
        # The name is last and not split, because it may contain a comma.
        parts = [part.strip() for part in line.split(",", 4)]
        if len(parts) == 5 and parts[2].isdecimal() and parts[3].isdecimal():
            gpus.append(Gpu(parts[0], parts[1], parts[4], int(parts[2]) * MIB, int(parts[3]) * MIB))
    return gpus


def find_engine_device(gpus: list[Gpu], environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the first GPU that a child process sees: its index, or the entry of CUDA_VISIBLE_DEVICES if that names a
    part of a GPU (MIG); None without a GPU."""
    if not gpus:
        return None
    first = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if not first:
        return gpus[0].index
    # CUDA accepts the beginning of a UUID too.
    return next((gpu.index for gpu in gpus if first == gpu.index or gpu.uuid.startswith(first)), first)
