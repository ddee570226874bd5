"""The parts that all trainer processes share: start, report progress, resume, write the adapter.

Standard output carries JSON lines and nothing else; all other output goes to standard error, which is the log.

Flow of `main`: `start` -> build a trainer with `trainer_arguments` -> `train_and_write` (resumes by itself).
Invariant: the adapter directory appears whole, with its manifest, or not at all.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sized
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from peft import LoraConfig, PeftModel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl.trainer import utils as trl_utils

from memory.adapters import (
    FILE_NAMES,
    Fingerprint,
    Manifest,
    digest_base,
    digest_chat_template,
    digest_tokenizer,
    write_adapter_atomically,
    write_manifest,
)
from optimizer.data.rows import read_rows
from optimizer.training.base import locate_base
from optimizer.training.fused_lora import fuse_lora
from optimizer.training.spec import LAUNCHER_PID, TrainingSpec

IGNORED = -100
"""The label of a token without a loss, for transformers and TRL."""
FINGERPRINT_TOKENS = 256
PR_SET_PDEATHSIG = 1
CHECKPOINT_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "adapter_model.safetensors")


class Reporter:
    """Writes one JSON object per line to the original standard output."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def emit(self, event: str, **fields: Any) -> None:
        self._stream.write(json.dumps({"event": event, **fields}) + "\n")
        self._stream.flush()


def start(arguments: list[str], kind: str) -> tuple[TrainingSpec, Reporter]:
    """Read the spec, reserve standard output for progress, and have this process die with its parent.

    Raises:
        ValueError: the spec is for another trainer.
    """
    spec = TrainingSpec.model_validate_json(Path(arguments[1]).read_text(encoding="utf-8"))
    if spec.kind != kind:
        raise ValueError(f"the spec {arguments[1]!r} is for {spec.kind!r}, this is the {kind!r} trainer")
    # order: duplicated before descriptor 1 is pointed at the log, or progress would go there too
    reporter = Reporter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # libraries print to standard output
    _die_with_parent()
    torch.set_num_threads(spec.num_threads)
    # before the model is built: LoRA's first matrices are drawn at random
    set_seed(spec.seed)
    score_own_tokens_only()
    reporter.emit("started", rows=str(spec.rows_path))
    return spec, reporter


def score_own_tokens_only() -> None:
    """Have TRL's fused head compute log-probs where there is a label, on CPUs as well as on GPUs.

    TRL 1.16 scores every position where there is no Triton, so that compilers see constant shapes. A CPU compiles
    nothing, and of a row with a tool call nine tokens in ten are prompt. Idempotent.
    """
    # a private name of TRL, which pyproject.toml pins: in this module it decides nothing else, and
    # tests/optimizer/data/test_masks.py fails where it vanishes
    trl_utils._use_triton = (  # pyright: ignore[reportPrivateImportUsage]
        lambda device: device.type in ("cpu", "cuda", "xpu")
    )


def _die_with_parent() -> None:
    """Be killed when the parent process ends, also when it ended while this one was still importing."""
    if sys.platform != "linux":
        return
    # Linux sends the signal when the *thread* that started this process ends (prctl(2)): launch.py must start trainers
    # from the event loop's thread, never from a worker thread
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # the parent may have died before prctl: then no signal ever comes
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and os.getppid() != int(launcher):
        raise SystemExit("the process that started this trainer is gone")


def uses_gpu(spec: TrainingSpec) -> bool:
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch sees no GPU; use device 'auto' or 'cpu'")
    return spec.device != "cpu" and torch.cuda.is_available()


def multiplies_in_bfloat16(spec: TrainingSpec) -> bool:
    """Whether matrices are multiplied in bfloat16, independently of the dtype of the weights."""
    if spec.dtype != "auto" or uses_gpu(spec):
        return choose_dtype(spec) is torch.bfloat16
    # a private function of torch 2.13: check that it exists when the pin moves
    return torch.cpu._is_avx512_bf16_supported()


def choose_dtype(spec: TrainingSpec) -> torch.dtype:
    """Return the dtype of the base's weights."""
    if spec.dtype == "auto":
        return torch.bfloat16 if uses_gpu(spec) else torch.float32
    return torch.bfloat16 if spec.dtype == "bfloat16" else torch.float32


def fuse(model: PeftModel, spec: TrainingSpec) -> None:
    """Have the LoRA layers of a model compute in one function each, in the dtype of the training's products."""
    fuse_lora(model, torch.bfloat16 if multiplies_in_bfloat16(spec) else choose_dtype(spec))


def load_base(spec: TrainingSpec) -> tuple[Any, Any]:
    """Return (model, tokenizer); the model on the CPU, in the dtype it is trained in."""
    base_dir = locate_base(spec.base_model)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    if tokenizer.pad_token is None:
        # padding has neither attention nor loss: any token will do, but the collators need one
        tokenizer.pad_token = tokenizer.eos_token
    # loaded here, because TRL loads a model that is given by path in float32
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=choose_dtype(spec))
    # the KV cache is of no use in training, and incompatible with gradient checkpointing
    model.config.use_cache = False
    return model, tokenizer


def load_start(spec: TrainingSpec, *, is_trained: bool = True) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a training that continues `spec.parent_adapter`, or the bare base without one."""
    model, tokenizer = load_base(spec)
    if spec.parent_adapter is not None:
        # is_trainable, and no `peft_config` for the trainer: TRL copies this adapter to a frozen "ref" as the
        # reference, and raises if it gets both
        model = PeftModel.from_pretrained(model, str(spec.parent_adapter), is_trainable=True)
        # before TRL computes the reference, which must be rounded as the policy is
        if is_trained:
            fuse(model, spec)
    return model, tokenizer


def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    """Return rows of different lengths as one tensor, (num_rows, num_tokens), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def lora_settings(spec: TrainingSpec) -> dict[str, Any]:
    """Return the LoRA that vLLM can serve: every linear layer but the head, no bias, no DoRA, no further modules."""
    return {
        "r": spec.lora_rank,
        "lora_alpha": spec.lora_alpha,
        "lora_dropout": 0.0,
        # without the head: TRL 1.16 raises for a LoRA on lm_head. Loosen nothing here without memory/adapters.py, which
        # rejects what vLLM cannot serve
        "target_modules": "all-linear",
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def choose_lora(spec: TrainingSpec) -> LoraConfig | None:
    """Return the LoRA that a trainer adds to the model of `load_start`; None where that continues an adapter."""
    return None if spec.parent_adapter else LoraConfig(**lora_settings(spec))


def trainer_arguments(spec: TrainingSpec, num_rows: int) -> dict[str, Any]:
    """Return the arguments that the configurations of all TRL trainers share."""
    rows_per_pass = min(spec.rows_per_pass, spec.batch_size)
    # rounded up: where rows_per_pass does not divide batch_size, a step takes more rows than batch_size. The digest
    # leaves rows_per_pass out (spec.py) because footprint.py gives powers of two, which divide the recipes' batches
    num_passes = math.ceil(spec.batch_size / rows_per_pass)
    steps_per_epoch = math.ceil(math.ceil(num_rows / rows_per_pass) / num_passes)
    num_steps = max(1, math.ceil(steps_per_epoch * spec.epochs))
    return {
        "output_dir": str(spec.work_dir / "checkpoints"),
        "per_device_train_batch_size": rows_per_pass,
        "gradient_accumulation_steps": num_passes,
        "num_train_epochs": spec.epochs,
        "learning_rate": spec.learning_rate,
        "warmup_steps": 0.05,  # below 1: a share of all steps; the schedule itself is `WarmStart`'s
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "steps",
        # a share of the whole, so that a kill costs the same part of a long and of a short training
        "save_steps": max(1, num_steps // spec.num_checkpoints),
        "save_total_limit": 2,  # a kill while the newest is written leaves the one before
        "seed": spec.seed,
        # together with the seed: a resumed training sees the same order of rows
        "data_seed": spec.seed,
        "use_cpu": not uses_gpu(spec),
        "bf16": multiplies_in_bfloat16(spec),
        "gradient_checkpointing": spec.gradient_checkpointing,
        "train_sampling_strategy": "group_by_length",
        # rows of one sequence lack the column, and transformers measures their input_ids; preferences have no
        # input_ids, so dpo.measure adds it
        "length_column_name": "length",
        "dataloader_num_workers": 0,
        "report_to": "none",
        "disable_tqdm": True,
        # TRL's default is 1024 and cuts the end of a row, the reply, without an error
        "max_length": None,  # rows that are too long were left out when they were built
    }


class WarmStart(Trainer):
    """A trainer whose learning rate warms up from above 0 and falls linearly; mixed in before TRL's own class.

    The schedule of transformers gives the first step a rate of 0: of nine steps one learns nothing.
    """

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        if self.lr_scheduler is None:
            num_warmup = self.args.get_warmup_steps(num_training_steps)
            share = partial(share_of_rate, num_warmup=num_warmup, num_steps=num_training_steps)
            self.lr_scheduler = LambdaLR(cast(torch.optim.Optimizer, optimizer or self.optimizer), share)
        return self.lr_scheduler


def share_of_rate(step: int, *, num_warmup: int, num_steps: int) -> float:
    """Return which share of the full learning rate the optimizer step after `step` others gets; never 0 within them."""
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    return max(0, num_steps - step) / max(1, num_steps - num_warmup)


class _Progress(TrainerCallback):
    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            numbers = {key: round(float(value), 6) for key, value in logs.items() if isinstance(value, int | float)}
            self._reporter.emit("step", step=state.global_step, total=state.max_steps, **numbers)


class _WriteEarlyAdapters(TrainerCallback):
    """Writes the early adapters of the spec, each after its optimizer step."""

    def __init__(self, trainer: Trainer, spec: TrainingSpec, probe_token_ids: list[int]) -> None:
        self._trainer, self._spec, self._probe = trainer, spec, probe_token_ids

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for early in self._spec.early_adapters:
            # transformers calls on_step_end before it saves the checkpoint of the same step: after a kill in between,
            # the step is made again and finds the adapter written
            is_due = state.global_step == max(1, round(early.share * state.max_steps))
            if is_due and not early.output_dir.exists():  # a resumed training makes some steps again
                metrics = {"num_steps": state.global_step}
                write_adapter(self._trainer, self._spec.at(early), metrics, self._probe)
                assert self._trainer.model is not None
                # write_adapter leaves the model in evaluation mode
                self._trainer.model.train()


def run(trainer: Trainer, spec: TrainingSpec, reporter: Reporter, probe_token_ids: list[int]) -> dict[str, float]:
    """Train, from the last whole checkpoint if there is one; return the metrics that matter afterwards."""
    assert isinstance(trainer.model, PeftModel)
    fuse(trainer.model, spec)  # of a new adapter, which TRL's constructor adds
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Progress(reporter))
    trainer.add_callback(_WriteEarlyAdapters(trainer, spec, probe_token_ids))
    checkpoint = find_checkpoint(spec.work_dir / "checkpoints")
    if checkpoint is not None:
        reporter.emit("resumed", checkpoint=checkpoint.name)
    started_at = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return _summarize(trainer.state, len(cast(Sized, trainer.train_dataset)), time.monotonic() - started_at)


def find_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, and delete torn ones."""
    # by number: as text, checkpoint-9 sorts behind checkpoint-10
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        if _is_whole(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _is_whole(checkpoint: Path) -> bool:
    # trainer_state.json is the last file that the trainer writes
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all((checkpoint / name).is_file() for name in CHECKPOINT_FILES)


def _summarize(state: TrainerState, num_rows: int, seconds: float) -> dict[str, float]:
    steps = [entry for entry in state.log_history if "loss" in entry]
    # single steps are noisy: a fifth of the training on either side
    window = max(1, len(steps) // 5)
    summary: dict[str, float] = {"num_rows": num_rows, "num_steps": state.global_step, "seconds": round(seconds, 1)}
    for key in (
        "loss",
        "mean_token_accuracy",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "clip_ratio",
        "engine_gap",
    ):
        values = [entry[key] for entry in steps if key in entry]
        if values:
            summary[f"{key}/first"] = round(sum(values[:window]) / window, 4)
            summary[f"{key}/last"] = round(sum(values[-window:]) / window, 4)
    return summary


def write_adapter(
    trainer: Trainer, spec: TrainingSpec, metrics: Mapping[str, float], probe_token_ids: list[int]
) -> None:
    """Write the adapter directory with its manifest. The model is in evaluation mode afterwards."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.eval()
    # before anything is written: a directory under its final name is never replaced, and memory/adapters.py would
    # reject one with NaN
    _require_finite(model)
    unfinished = spec.work_dir / "adapter"
    # left by a kill in the middle of an earlier write; early adapters and the final one use the same path in turn
    shutil.rmtree(unfinished, ignore_errors=True)
    # selected: the model of DPO holds the reference, "ref", too, which would be saved beside it. save_embedding_layers:
    # by default PEFT compares vocabularies and may add the embeddings, which vLLM would not serve
    model.save_pretrained(unfinished, selected_adapters=["default"], save_embedding_layers=False)
    for path in unfinished.iterdir():
        if path.name not in FILE_NAMES:
            path.unlink()  # a model card with nothing in it
    # order: the manifest, then the rename; a directory under its final name is taken to be complete
    write_manifest(unfinished, describe_adapter(spec, metrics, take_fingerprint(model, probe_token_ids)))
    write_adapter_atomically(unfinished, spec.output_dir)


def main(
    kind: str,
    build_trainer: Callable[[TrainingSpec, list[dict[str, Any]]], Trainer],
    *,
    tokens_of: Callable[[dict[str, Any]], list[int]] = itemgetter("input_ids"),
) -> None:
    """Train as the spec in the first argument of this process says. `tokens_of`: the token ids of one of its rows."""
    spec, reporter = start(sys.argv, kind)
    rows = read_rows(spec.rows_path)
    train_and_write(build_trainer(spec, rows), spec, reporter, choose_probe(tokens_of(rows[0])))


def train_and_write(trainer: Trainer, spec: TrainingSpec, reporter: Reporter, probe_token_ids: list[int]) -> None:
    """Train, write the adapter, and report the end."""
    metrics = run(trainer, spec, reporter, probe_token_ids)
    write_adapter(trainer, spec, metrics, probe_token_ids)
    reporter.emit("done", path=str(spec.output_dir), metrics=metrics)


def _require_finite(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name and not torch.isfinite(parameter).all():
            raise FloatingPointError(f"{name} is not finite after training; lower the learning rate")


def describe_adapter(spec: TrainingSpec, metrics: Mapping[str, float], fingerprint: Fingerprint) -> Manifest:
    """Return the manifest: the adapter's base and parent, the trajectories it learned from, its fingerprint."""
    base_dir = locate_base(spec.base_model)
    fingerprint_dtype = str(choose_dtype(spec)).removeprefix("torch.")
    return Manifest(
        name=spec.name,
        version=spec.version,
        kind=spec.kind,
        base_model=spec.base_model,
        base_digest=digest_base(base_dir),
        tokenizer_digest=digest_tokenizer(base_dir),
        chat_template_digest=digest_chat_template(AutoTokenizer.from_pretrained(base_dir).get_chat_template()),
        trajectory_ids=sorted(spec.trajectory_ids),
        parent=spec.parent,
        seeds={"training": spec.seed},
        settings={**spec.settings(), "spec_digest": spec.digest(), "fingerprint_dtype": fingerprint_dtype},
        metrics=dict(metrics),
        fingerprint=fingerprint,
    )


@torch.no_grad()
def take_fingerprint(model: PeftModel, token_ids: list[int]) -> Fingerprint:
    """Return the log-probs of `token_ids[1:]` with and without the adapter, which a server must reproduce."""
    # TRL switches adapters to compute the reference
    model.set_adapter("default")
    ids = torch.tensor([token_ids], device=next(model.parameters()).device)
    # both values are compared after loading: vLLM serves an adapter whose modules match nothing as the base
    # (vLLM#34186), and on CPUs 0.32 gave rows of the base an adapter (vLLM#48421)
    adapted = _token_logprobs(model, ids)
    with model.disable_adapter():
        bare = _token_logprobs(model, ids)
    return Fingerprint(token_ids=token_ids, base_logprobs=bare, adapter_logprobs=adapted)


def _token_logprobs(model: PeftModel, ids: torch.Tensor) -> list[float]:
    # float32 before the softmax: bfloat16 has steps of 1/32 between 4 and 8, where log-probs of unlikely tokens lie.
    # The logits at i predict token i + 1
    logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(dim=-1)  # (num_tokens - 1, vocabulary)
    return [round(value, 5) for value in logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()]


def choose_probe(token_ids: list[int]) -> list[int]:
    """Return the end of a row: the agent's own tokens are there, on which an adapter has an effect."""
    return token_ids[-FINGERPRINT_TOKENS:]
