"""The SFT trainer's start. TRL's trainer in this process."""

from __future__ import annotations

from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from memory.adapters import WEIGHTS_NAME
from optimizer.config import DemonstrationConfig
from optimizer.data.demonstrations import build_demonstrations
from optimizer.data.rows import read_rows
from optimizer.training import sft
from tests.optimizer.data.test_masks import WON, sft_adapter, spec
from tests.optimizer.worlds import live

__all__ = ["sft_adapter", "spec"]


def test_training_starts_from_the_adapter_that_it_continues(spec, tokenizer, sft_adapter):
    graded = [live(WON, tokenizer=tokenizer)]
    rows = build_demonstrations(graded, tokenizer, config=DemonstrationConfig(), max_length_tokens=2048).rows
    made = spec("sft", rows, dtype="float32", parent_adapter=sft_adapter)

    model = sft.build_trainer(made, read_rows(made.rows_path)).model

    parent = load_file(sft_adapter / WEIGHTS_NAME)
    started = get_peft_model_state_dict(model)
    assert parent and started.keys() == parent.keys()
    assert all(started[name].float().equal(value.float()) for name, value in parent.items())
    assert any(parameter.requires_grad for parameter in model.parameters())
