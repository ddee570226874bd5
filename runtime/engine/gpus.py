"""Lists the GPUs of this machine by `nvidia-smi`: PyTorch would take memory on each for asking."""

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
    """One GPU and what is free on it now. `index` is nvidia-smi's, which is CUDA's by PCI_BUS_ID."""

    index: str
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int


def list_gpus() -> list[Gpu]:
    """Return the GPUs that PyTorch can use; none without a driver, or where PyTorch is the build for CPUs. Blocks."""
    tool = shutil.which("nvidia-smi")
    if tool is None or importlib.metadata.version("torch").endswith("+cpu"):
        return []
    try:
        said = subprocess.run([tool, *QUERY], capture_output=True, text=True, timeout=QUERY_SECONDS, check=True).stdout
    except (subprocess.SubprocessError, OSError) as error:
        log.warning("nvidia-smi fails: no GPU is known", error=str(error))
        return []
    return parse_gpus(said)


def parse_gpus(said: str) -> list[Gpu]:
    """Return what nvidia-smi printed for `QUERY`; a GPU that does not say its memory is left out."""
    gpus = []
    for line in said.splitlines():
        parts = [part.strip() for part in line.split(",", 4)]
        if len(parts) == 5 and parts[2].isdecimal() and parts[3].isdecimal():
            gpus.append(Gpu(parts[0], parts[1], parts[4], int(parts[2]) * MIB, int(parts[3]) * MIB))
    return gpus


def find_engine_device(gpus: list[Gpu], environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the GPU that an engine started here takes (its first): an index, or as CUDA_VISIBLE_DEVICES has it where
    that names a part of one; None without a GPU."""
    if not gpus:
        return None
    first = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if not first:
        return gpus[0].index
    return next((gpu.index for gpu in gpus if first == gpu.index or gpu.uuid.startswith(first)), first)
