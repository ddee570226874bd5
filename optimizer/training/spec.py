"""The spec file: everything a trainer process is told, and all it is told.

Refuses to know about cycles, stages or databases. The same spec file started again goes on where the last try died.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from memory.names import Name

LAUNCHER_PID = "TRAINER_LAUNCHER_PID"
"""Environment variable: the process whose end is the trainer's end too."""

SETTINGS = (
    "lora_rank",
    "lora_alpha",
    "learning_rate",
    "epochs",
    "batch_size",
    "rows_per_pass",
    "beta",
    "sft_weight",
    "device",
    "dtype",
)


NOT_DIGESTED = (
    "work_dir",
    "output_dir",
    "rows_path",
    "num_threads",
    "num_checkpoints",
    "visible_device",
    "rows_per_pass",  # as many as fit where it runs; the batch is the same
    "early_adapters",
)
"""Where and with what room a training runs: another value of these is the same training."""


class EarlyAdapter(BaseModel, extra="forbid"):
    """An adapter that is left behind on the way: the same training, stopped earlier."""

    version: int
    output_dir: Path
    share: float
    """Of all optimizer steps; above 0 and below 1."""


class TrainingSpec(BaseModel, extra="forbid"):
    """One training, from rows to an adapter directory."""

    kind: Literal["sft", "dpo"]
    name: Name
    version: int
    base_model: str
    """A directory, or a Hugging Face id whose files are already on this machine."""
    rows_path: Path
    """JSON lines as `optimizer.data.rows.write_rows` writes them."""
    output_dir: Path
    """The adapter directory; it must not exist before, and appears whole."""
    work_dir: Path
    """Checkpoints, the spec file and the log live here until the adapter is done."""
    parent: int | None = None
    """The policy version that this one comes from."""
    parent_adapter: Path | None = None
    """Where training starts (and, for DPO, what the reference is); None: the bare base."""
    trajectory_ids: list[str] = []
    early_adapters: list[EarlyAdapter] = []

    lora_rank: int
    lora_alpha: int
    learning_rate: float
    epochs: float
    batch_size: int
    rows_per_pass: int
    beta: float = 0.1
    sft_weight: float = 0.0
    gradient_checkpointing: bool = False
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    visible_device: str | None = None
    """The one GPU that the trainer sees, as nvidia-smi counts them; None leaves it to see what we see."""
    num_threads: int = 2
    num_checkpoints: int = 8
    """How often the state is saved during the whole training."""

    def at(self, early: EarlyAdapter) -> TrainingSpec:
        """Return the spec that an early adapter is registered by."""
        return self.model_copy(update={"version": early.version, "output_dir": early.output_dir})

    def settings(self) -> dict[str, Any]:
        """What the manifest says of how the adapter was trained."""
        return self.model_dump(include=set(SETTINGS))

    def digest(self) -> str:
        """What makes this training this one: the spec with its rows, but not where it runs and keeps its state."""
        spec = self.model_dump_json(exclude=set(NOT_DIGESTED))
        return hashlib.sha256(spec.encode() + self.rows_path.read_bytes()).hexdigest()
