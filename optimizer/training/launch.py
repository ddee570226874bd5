"""Runs a trainer as a child process and returns the manifest of its adapter.

PyTorch is not imported here: a training may crash, run out of memory or be killed without costing an answer, and its
memory is returned to the system. A trainer that died is started again from its last checkpoint.

Flow: spec -> spec file -> child process -> progress lines -> adapter directory with its manifest.
Invariant: when `train` returns, the adapter directory is whole and was made from this very spec.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from memory.adapters import Manifest, read_manifest
from optimizer.errors import TrainingError
from optimizer.training.spec import LAUNCHER_PID, TrainingSpec

ROOT = Path(__file__).resolve().parents[2]
LOG_TAIL_LINES = 15
LINE_LIMIT_BYTES = 1 << 20
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the numbers of nvidia-smi
}

OnStep = Callable[[dict[str, Any]], Awaitable[None]]
"""`await on_step({"step": 3, "total": 35, "loss": 0.71, ...})`"""


async def train(spec: TrainingSpec, *, on_step: OnStep | None = None, num_attempts: int = 2) -> Manifest:
    """Return the manifest of the adapter that `spec` asks for, training it unless that was done before.

    Raises:
        TrainingError: the trainer died `num_attempts` times; the message ends with the tail of its log.
        FileExistsError: `output_dir` holds an adapter made from another spec.
    """
    manifest = read_finished(spec)
    if manifest is not None:
        return manifest
    spec.work_dir.mkdir(parents=True, exist_ok=True)
    # before the new spec is written, which is compared with the old one
    _delete_other_checkpoints(spec)
    spec_path = spec.work_dir / "spec.json"
    spec_path.write_text(spec.model_dump_json(indent=1), encoding="utf-8")
    exit_code, last_step = 0, {}
    for _ in range(num_attempts):
        exit_code, last_step = await _run_child(spec, spec_path, on_step)
        manifest = read_finished(spec)
        # an exit code of 0 proves nothing by itself: a whole adapter directory with this spec's digest does
        if exit_code == 0 and manifest is not None:
            shutil.rmtree(spec.work_dir / "checkpoints", ignore_errors=True)
            return manifest
    raise TrainingError(_explain(spec, exit_code, last_step, num_attempts))


async def score(spec: TrainingSpec, *, on_step: OnStep | None = None) -> list[float]:
    """Return the margin log p(yes) - log p(no) of each row of a spec of the kind "score".

    Raises:
        TrainingError: the process died.
    """
    spec.work_dir.mkdir(parents=True, exist_ok=True)
    margins_path(spec).unlink(missing_ok=True)
    spec_path = spec.work_dir / "score.json"
    spec_path.write_text(spec.model_dump_json(indent=1), encoding="utf-8")
    exit_code, last_step = await _run_child(spec, spec_path, on_step)
    if exit_code or not margins_path(spec).exists():
        raise TrainingError(_explain(spec, exit_code, last_step, 1))
    return json.loads(margins_path(spec).read_text(encoding="utf-8"))


def margins_path(spec: TrainingSpec) -> Path:
    """Return the file that a scoring writes."""
    return spec.work_dir / "margins.json"


def read_finished(spec: TrainingSpec) -> Manifest | None:
    """Return the manifest in `output_dir` if this spec was trained to its end before."""
    if not spec.output_dir.exists():
        return None
    manifest = read_manifest(spec.output_dir)
    if manifest.settings.get("spec_digest") != spec.digest():
        raise FileExistsError(
            f"{str(spec.output_dir)!r} holds an adapter made from another spec; adapters are never overwritten"
        )
    return manifest


def _delete_other_checkpoints(spec: TrainingSpec) -> None:
    """Delete the checkpoints of another spec in the same directory, which must not be resumed."""
    spec_path = spec.work_dir / "spec.json"
    with contextlib.suppress(OSError, ValueError):
        if TrainingSpec.model_validate_json(spec_path.read_text(encoding="utf-8")).digest() == spec.digest():
            return
    shutil.rmtree(spec.work_dir / "checkpoints", ignore_errors=True)


async def _run_child(spec: TrainingSpec, spec_path: Path, on_step: OnStep | None) -> tuple[int, dict[str, Any]]:
    """Run the trainer once; return its exit code and the last step it reported."""
    last_step: dict[str, Any] = {}
    with log_path(spec).open("ab") as log:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"optimizer.training.{spec.kind}",
            str(spec_path.resolve()),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            stdin=asyncio.subprocess.DEVNULL,
            env=child_environment(spec),
            # its own process group, so that everything it starts is killed with it
            start_new_session=True,
            # asyncio's own limit is 64 KiB; a longer line makes the reader raise ValueError
            limit=LINE_LIMIT_BYTES,
        )
    try:
        assert child.stdout is not None
        async for line in child.stdout:
            event = _parse(line)
            if event.get("event") == "step":
                last_step = event
                if on_step is not None:
                    await on_step(event)
        return await child.wait(), last_step
    finally:
        if child.returncode is None:  # we were cancelled, or `on_step` raised
            with contextlib.suppress(ProcessLookupError):
                # the group has the child's id because of start_new_session; SIGKILL is safe, because a torn checkpoint
                # is deleted at the next start (child.find_checkpoint)
                os.killpg(child.pid, signal.SIGKILL)
            await child.communicate()  # not wait(): its pipe must be closed before the loop may end


def child_environment(spec: TrainingSpec) -> dict[str, str]:
    """Return the environment of a trainer: that of this process, without telemetry, this project on its import path."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # One GPU, or TRL would wrap the model in DataParallel, which it refuses.
    device = {} if spec.visible_device is None else {"CUDA_VISIBLE_DEVICES": spec.visible_device}
    return {
        # order: ours override those of this process
        **os.environ,
        **ENVIRONMENT,
        **device,
        "OMP_NUM_THREADS": str(spec.num_threads),
        # threads that spin while they wait hold a core that the engine, or the thread they wait for, needs: with one
        # core busy, two threads were five times slower than one. On a machine that only trains, ACTIVE is faster
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        # the server's working directory may be any: without this, `-m optimizer.training...` is not found
        "PYTHONPATH": os.pathsep.join(paths),
        # compared with getppid() in child.py: no shell or wrapper may stand between the two processes
        LAUNCHER_PID: str(os.getpid()),
    }


def log_path(spec: TrainingSpec) -> Path:
    return spec.work_dir / "trainer.log"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _explain(spec: TrainingSpec, exit_code: int, last_step: dict[str, Any], num_attempts: int) -> str:
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
    where = f"at step {last_step['step']} of {last_step['total']}" if last_step else "before its first step"
    lines = log_path(spec).read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(
        [
            f"the {spec.kind} trainer of {spec.name}-v{spec.version} {how} {where}, in {num_attempts} attempt(s); "
            f"its log is {str(log_path(spec))!r} and ends:",
            *(f"  {line}" for line in lines[-LOG_TAIL_LINES:]),
        ]
    )
