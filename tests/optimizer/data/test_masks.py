"""The loss covers the agent's own tokens and no others: TRL's trainers in this process, on rows with tool output."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOTrainer, SFTTrainer
from trl.trainer import utils as trl_utils

from optimizer.config import DemonstrationConfig, PreferenceConfig
from optimizer.data.demonstrations import build_demonstrations
from optimizer.data.preferences import build_preferences
from optimizer.data.rows import read_rows, write_rows
from optimizer.training import child, dpo, sft
from optimizer.training.child import IGNORED
from optimizer.training.shared_prompt import share_prompts
from optimizer.training.spec import TrainingSpec
from tests.optimizer.worlds import live

TOOL_OUTPUT = "The stove hisses."
WON = [("cook carrot with stove", TOOL_OUTPUT), ("eat meal", "Won!")]
LOST = [("cook carrot with oven", "The oven hums."), ("wait", "Lost!")]


@pytest.fixture
def spec(tiny_base, tmp_path):
    def make(kind: str, rows, **fields) -> TrainingSpec:
        write_rows(rows, tmp_path / "rows.jsonl")
        return TrainingSpec(
            kind=kind,
            name="tiny",
            version=1,
            base_model=str(tiny_base),
            rows_path=tmp_path / "rows.jsonl",
            output_dir=tmp_path / "adapter",
            work_dir=tmp_path / "work",
            lora_rank=8,
            lora_alpha=16,
            learning_rate=1e-3,
            device="cpu",
            **{"epochs": 1, "batch_size": 2, "rows_per_pass": 2, **fields},
        )

    return make


@pytest.fixture
def sft_adapter(tiny_base, tmp_path):
    """An adapter with an effect: its B matrices are random instead of zero."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def head_gradient(trainer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the gradient at the input of the output head, (rows, tokens, width), and the batch.

    The head handles each position separately: the gradient is zero exactly where a position's logits do not count.
    """
    batch = next(iter(trainer.get_train_dataloader()))
    seen = []

    def keep(module, inputs, output):
        if output.requires_grad:  # reference passes have no gradient
            output.retain_grad()
            seen.append(output)

    hook = trainer.model.get_base_model().model.norm.register_forward_hook(keep)
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    hook.remove()
    gradient = seen[0].grad
    is_shared = len(gradient) < len(batch["input_ids"])  # pairs that have much of their rows in common
    return (separate(gradient, batch) if is_shared else gradient), batch


def separate(gradient: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the gradient of pairs that share their prompt as that of both sides, (rows, tokens, width)."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    origins = share_prompts(batch["input_ids"], batch["attention_mask"], labels).origins
    positions = torch.nn.functional.pad(gradient.flatten(0, 1), (0, 0, 0, 1))
    separated = torch.nn.functional.pad(positions[origins], (0, 0, 0, 1))
    assert torch.allclose(separated.abs().sum(), gradient.abs().sum())  # no other position is felt
    return separated


def assert_only_own_tokens_count(gradient: torch.Tensor, counts: torch.Tensor) -> None:
    """`counts` is 1 on the tokens whose prediction is trained; position i predicts token i + 1."""
    is_felt = gradient.abs().sum(dim=-1)[:, :-1] > 0
    assert torch.equal(is_felt, counts[:, 1:].bool())


def test_sft_feels_nothing_at_tool_output(spec, tokenizer):
    graded = [live(WON, tokenizer=tokenizer, task=task) for task in "ab"]
    rows = build_demonstrations(
        graded, tokenizer, config=DemonstrationConfig(keep_memory_share=0), max_length_tokens=2048
    ).rows
    made = spec("sft", rows)

    gradient, batch = head_gradient(sft.build_trainer(made, read_rows(made.rows_path)))

    assert TOOL_OUTPUT in tokenizer.decode(batch["input_ids"][0][batch["labels"][0] == -100])
    assert_only_own_tokens_count(gradient, batch["labels"] != -100)


def test_dpo_feels_nothing_at_tool_output_on_either_side(spec, tokenizer, sft_adapter):
    graded = [live(WON, tokenizer=tokenizer), live(LOST, tokenizer=tokenizer, is_success=False)]
    rows = build_preferences(graded, tokenizer, config=PreferenceConfig(scope="remainder"), max_length_tokens=2048).rows
    made = spec("dpo", rows, parent_adapter=sft_adapter, sft_weight=0.2)

    gradient, batch = head_gradient(dpo.build_trainer(made, read_rows(made.rows_path)))

    chosen, rejected = batch["input_ids"]
    assert TOOL_OUTPUT in tokenizer.decode(chosen) and "The oven hums." in tokenizer.decode(rejected)
    assert_only_own_tokens_count(gradient, batch["completion_mask"])


def test_the_output_head_computes_no_logits_where_nothing_is_trained(spec, tokenizer, monkeypatch):
    """TRL 1.16 projects every position on a CPU; with a vocabulary of 49,000, that is most of a training."""
    monkeypatch.setattr(trl_utils, "_use_triton", trl_utils._use_triton)  # restored at the end
    child.score_own_tokens_only()
    projected = []
    score = trl_utils._ChunkedLogProbFunction.apply

    def count(hidden, *rest):
        projected.append(len(hidden))
        return score(hidden, *rest)

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", count)
    graded = [live(WON, tokenizer=tokenizer, task=task) for task in "ab"]
    config = DemonstrationConfig(keep_memory_share=0)
    rows = build_demonstrations(graded, tokenizer, config=config, max_length_tokens=2048).rows
    made = spec("sft", rows)

    gradient, batch = head_gradient(sft.build_trainer(made, read_rows(made.rows_path)))

    assert projected == [int((batch["labels"][:, 1:] != -100).sum())]
    assert_only_own_tokens_count(gradient, batch["labels"] != -100)


def test_the_reference_is_the_sft_adapter_not_the_base(spec, tokenizer, sft_adapter):
    graded = [live(WON, tokenizer=tokenizer), live(LOST, tokenizer=tokenizer, is_success=False)]
    rows = build_preferences(graded, tokenizer, config=PreferenceConfig(), max_length_tokens=2048).rows
    made = spec("dpo", rows, parent_adapter=sft_adapter, dtype="float32")
    trainer = dpo.build_trainer(made, read_rows(made.rows_path))

    head_gradient(trainer)

    for side in ("chosen", "rejected"):
        assert abs(trainer._metrics["train"][f"rewards/{side}"][0]) < 1e-4
    frozen = [
        name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad and ".ref." in name
    ]
    assert not frozen


def test_a_demonstration_is_labelled_on_the_agents_own_tokens_only():
    labelled = sft.label({"input_ids": [5, 6, 7], "mask": [0, 1, 0]})

    assert labelled == {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]}


def test_the_collator_masks_prompt_observations_and_padding():
    row = {
        "prompt_ids": [1, 2],
        "chosen_ids": [3, 4, 5],
        "chosen_mask": [1, 0, 1],
        "rejected_ids": [6],
        "rejected_mask": [1],
    }

    batch = dpo.MaskedPreferenceCollator(pad_token_id=0)([row])

    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 6, 0, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0, 1], [0, 0, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_the_hooks_that_are_replaced_exist_in_the_pinned_trl():
    assert version("trl").startswith("1.16.")
    for hook in (
        "_prepare_dataset",
        "_set_signature_columns_if_needed",
        "_compute_loss",
        "compute_ref_log_probs",
    ):
        assert hook in vars(DPOTrainer)
    assert "labels" in SFTTrainer._prepare_dataset.__code__.co_consts


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    for step in (5, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name in child.CHECKPOINT_FILES:
            (checkpoint / name).write_text("{}")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"cut')

    assert child.find_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert not (tmp_path / "checkpoint-10").exists()
