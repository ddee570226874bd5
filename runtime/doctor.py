"""Checks everything that answers depend on, and reports the state and the remedy of each in one line.

Invariants: no check repairs anything; a check reports the exceptions it expects instead of raising them.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from memory.errors import StoreError
from memory.store import Memory
from runtime.engine.process import Engine
from runtime.errors import AdapterError, EngineError, PolicyError

GIB = 1024**3
MIN_FREE_BYTES = 2 * GIB
ENCODER_SECONDS = 20.0
NO_ADAPTER = "ratchet-doctor"
"""A name that no adapter has."""


@dataclass(frozen=True)
class HealthCheck:
    """The result of one check; `mend` names the remedy if it failed."""

    name: str
    is_ok: bool
    detail: str
    mend: str = ""


def check_at_rest(memory: Memory) -> list[HealthCheck]:
    """Run all checks that need no engine. Blocks for seconds: call it in a thread."""
    return [check_rows(memory), check_encoder(memory), check_index(memory), check_disk(memory), check_gpu()]


def check_rows(memory: Memory) -> HealthCheck:
    started = time.monotonic()
    try:
        problems: Sequence[str] = memory.database.check()
    except StoreError as error:
        problems = [str(error)]
    if problems:
        mend = {"sqlite": "restore ratchet.db from a backup", "postgresql": "see the server's settings and its log"}
        return HealthCheck(memory.database.kind, False, "; ".join(problems[:3]), mend[memory.database.kind])
    detail = f"{memory.database.location} is sound ({time.monotonic() - started:.2f} s)"
    return HealthCheck(memory.database.kind, True, detail)


def check_encoder(memory: Memory) -> HealthCheck:
    """Wait for memory's own encoder; if it does not load, load another one for the error message."""
    from memory.search.encoder import SentenceEncoder

    name, deadline = memory.config.encoder, time.monotonic() + ENCODER_SECONDS
    while not memory.index.has_vectors and time.monotonic() < deadline:
        time.sleep(0.1)
    if memory.index.has_vectors:
        return HealthCheck("encoder", True, f"{name}: loaded")
    try:
        vectors = SentenceEncoder(name).encode(["Is anybody there?"])
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        return HealthCheck(
            "encoder", False, f"{name}: {error}", "set memory.encoder to 'embedded', which needs no download"
        )
    return HealthCheck("encoder", True, f"{name}: {vectors.shape[1]} dimensions, though memory has not loaded it yet")


def check_index(memory: Memory) -> HealthCheck:
    try:
        counts = memory.index.count()
    except (StoreError, OSError, RuntimeError) as error:
        return HealthCheck("index", False, str(error), "serve.py rebuild-index")
    contents = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing yet"
    if not memory.index.has_vectors:
        return HealthCheck("index", True, f"by word only, the encoder is still loading: {contents}")
    return HealthCheck("index", True, f"by meaning and by word: {contents}")


def check_disk(memory: Memory) -> HealthCheck:
    free = shutil.disk_usage(memory.data_dir).free
    return HealthCheck("disk", free >= MIN_FREE_BYTES, f"{free / GIB:.1f} GiB free", "free some space: 2 GiB at least")


def check_gpu() -> HealthCheck:
    """List the GPUs. A machine without one passes: everything runs on the CPU then."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return HealthCheck("gpu", True, "none: the CPU does everything")
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError) as error:
        return HealthCheck("gpu", False, f"nvidia-smi fails: {error}", "see to the driver, or make EXTRA=cpu")
    return HealthCheck("gpu", True, listed.replace("\n", "; "))


async def check_engine(engine: Engine) -> list[HealthCheck]:
    """Check that the engine generates a real token, and that adapters can be loaded and unloaded."""
    started = time.monotonic()
    if not await engine.client.probe():
        return [HealthCheck("engine", False, f"{engine.url or 'not started'}: no token", f"read {engine.log_path}")]
    token = HealthCheck("engine", True, f"{engine.url}: a real token in {1000 * (time.monotonic() - started):.0f} ms")
    try:
        loaded = await engine.client.adapters()
        # Unloading an unknown adapter succeeds only if vLLM allows updates at runtime.
        await engine.client.unload_adapter(NO_ADAPTER)
    except (AdapterError, EngineError, PolicyError) as error:
        mend = "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        return [token, HealthCheck("lora", False, str(error), mend)]
    return [
        token,
        HealthCheck("lora", True, f"adapters come and go; now loaded: {', '.join(sorted(loaded)) or 'none'}"),
    ]
