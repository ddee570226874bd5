"""The spec file: the whole input of a trainer process.

Started again with the same spec file, a trainer resumes from its last checkpoint. Hazard: each field but those in
`NOT_DIGESTED` is part of the digest by which a finished training is recognised; a new field, even with a default, makes
the trainings of open cycles look like other ones.
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
    "loss",
    "discount",
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
"""Fields about the device and the directories: the training is the same for any value of these."""


ADDED_LATER = ("loss", "discount")


class EarlyAdapter(BaseModel, extra="forbid"):
    """An adapter that is written during the training: the same training, stopped earlier."""

    version: int
    output_dir: Path
    share: float
    """Of all optimizer steps; above 0 and below 1."""


class TrainingSpec(BaseModel, extra="forbid"):
    """One training, from rows to an adapter directory."""

    kind: Name
    """The method; its trainer is the module `optimizer.training.<kind>`."""
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
    """The start of the training and, for DPO, the reference; None: the bare base."""
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
    loss: Literal["", "sigmoid_norm", "dmpo"] = ""
    """A form of the method's loss; empty: its usual one."""
    discount: float | None = None
    """Of later turns, where the loss has one."""
    gradient_checkpointing: bool = False
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    visible_device: str | None = None
    """The one GPU that the trainer sees, as nvidia-smi counts them; None: the same as this process."""
    num_threads: int = 2
    num_checkpoints: int = 8
    """How often the state is saved during the whole training."""

    def at(self, early: EarlyAdapter) -> TrainingSpec:
        """Return the spec of the policy that serves an early adapter."""
        # the digest includes the version: each early adapter has a digest of its own
        return self.model_copy(update={"version": early.version, "output_dir": early.output_dir})

    def settings(self) -> dict[str, Any]:
        """Return the settings that the adapter's manifest records."""
        # stored in the manifest and printed by cycle/report_page.py, which needs rank, learning rate, epochs and batch
        return self.model_dump(include=set(SETTINGS))

    def digest(self) -> str:
        """Return the digest that identifies this training: the spec and its rows, without device and directories."""
        # rows by content: the file of a repeated stage has the same path
        # JSON in the order of the fields: to reorder them changes every digest as well
        # a field that came later is left out where it says nothing, so that older trainings keep their digest
        unset = {name for name in ADDED_LATER if not getattr(self, name)}
        spec = self.model_dump_json(exclude={*NOT_DIGESTED, *unset})
        return hashlib.sha256(spec.encode() + self.rows_path.read_bytes()).hexdigest()
