"""The estimate of training memory, against known figures of public models and against PyTorch."""

from __future__ import annotations

import json

import pytest

from optimizer.training.base import count_parameters
from optimizer.training.footprint import (
    GIB,
    LIKELIHOOD,
    PAIRWISE,
    TILE_TOKENS,
    TILE_VOCABULARY,
    ModelShape,
    Training,
    layer_bytes_per_token,
    least_engine_bytes,
    read_shape,
)
from runtime.engine.model_families import POCKET_MODEL

CONFIGS = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    },
    "SmolLM2-135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
}
SHAPES = {name: ModelShape.from_config(config) for name, config in CONFIGS.items()}
SEVEN_B = Training(SHAPES["Qwen2.5-7B"], PAIRWISE, lora_rank=32, gradient_checkpointing=True)


# From the model cards and the index files of the checkpoints.
@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Llama-3.1-8B", 8_030_261_248),
        ("SmolLM2-135M", 134_515_008),
    ],
)
def test_parameters_are_counted_as_the_model_cards_have_them(name: str, num_parameters: int):
    assert SHAPES[name].num_parameters == num_parameters


# "Trainable parameters" that PEFT prints for r = 16 on all linear layers.
@pytest.mark.parametrize(
    ("name", "num_trained"),
    [("Qwen2.5-7B", 40_370_176), ("Llama-3.1-8B", 41_943_040), ("SmolLM2-135M", 4_884_480)],
)
def test_a_lora_has_as_many_parameters_as_peft_prints(name: str, num_trained: int):
    assert 16 * SHAPES[name].linear_width == num_trained


def test_what_is_read_from_weight_files_agrees_with_the_config():
    from_config = ModelShape.from_config(json.loads((POCKET_MODEL / "config.json").read_text()))
    assert read_shape(POCKET_MODEL) == from_config
    assert from_config.num_parameters == count_parameters(POCKET_MODEL)


def test_a_config_without_its_sizes_is_refused_by_the_missing_one():
    with pytest.raises(ValueError, match="does not say 'intermediate_size'"):
        ModelShape.from_config({"hidden_size": 64})


@pytest.mark.parametrize(
    ("name", "rank", "checkpointing", "length", "rows", "least_gib", "most_gib"),
    [
        # A LoRA of a 7B or 8B in bfloat16 is known to need a card of at least 24 GiB, and to fit one of 40.
        ("Qwen2.5-7B", 32, True, 2048, 1, 18, 26),
        ("Llama-3.1-8B", 32, True, 2048, 1, 18, 26),
        # Without checkpointing the same 7B fills a card of 80 GiB at a few thousand tokens.
        ("Qwen2.5-7B", 32, False, 8192, 1, 70, 160),
        ("Qwen2.5-0.5B", 16, False, 2048, 2, 8, 20),
        ("SmolLM2-135M", 16, False, 2048, 2, 2, 12),
    ],
)
def test_a_training_takes_what_such_trainings_are_known_to_take(
    name, rank, checkpointing, length, rows, least_gib, most_gib
):
    total = Training(SHAPES[name], PAIRWISE, rank, checkpointing).footprint(length, rows).total
    assert least_gib <= total / GIB <= most_gib


def test_beside_an_engine_that_takes_85_percent_of_a_card_a_7b_does_not_fit():
    beside = int(0.15 * 80 * GIB)
    assert SEVEN_B.longest_row(beside, 2048) == 0
    assert SEVEN_B.longest_row(80 * GIB, 2048) == 2048
    engine = least_engine_bytes(SEVEN_B.shape, max_model_len=32768, max_loras=4, lora_rank=32)
    assert 17 * GIB < engine < 24 * GIB  # 14.2 of weights, 1.8 of attention, 0.6 of adapters, workspace


def test_the_longest_row_is_the_longest_that_fits():
    longest = SEVEN_B.longest_row(40 * GIB, 32768)
    assert 2048 < longest < 32768
    assert SEVEN_B.footprint(longest).total <= 40 * GIB < SEVEN_B.footprint(longest + 1).total


def test_rows_in_a_pass_shrink_until_they_fit_and_are_never_fewer_than_one():
    need = {rows: SEVEN_B.footprint(2048, rows).total for rows in (1, 2, 4)}
    assert [SEVEN_B.rows_that_fit(need[rows], 2048, 6) for rows in (4, 2, 1)] == [4, 2, 1]
    assert SEVEN_B.rows_that_fit(1, 2048, 6) == 1
    assert SEVEN_B.rows_that_fit(10**15, 2048, 6) == 6


def test_checkpointing_costs_less_memory_and_dpo_more_than_sft():
    shape = SHAPES["Llama-3.1-8B"]
    plain, saving = (Training(shape, LIKELIHOOD, 32, it).footprint(4096).activations for it in (False, True))
    assert saving < plain / 8
    sft, dpo = (Training(shape, loss, 32, True).footprint(4096) for loss in (LIKELIHOOD, PAIRWISE))
    assert dpo.activations == 2 * sft.activations and dpo.adapter > sft.adapter
    assert Training(shape, LIKELIHOOD, 32, True, bytes_per_weight=4).footprint(4096).weights == 2 * sft.weights


def test_the_tiles_are_those_of_the_installed_trl():
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    assert (TILE_TOKENS, TILE_VOCABULARY) == (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE)


@pytest.mark.parametrize(("heads", "kv_heads", "inner"), [(8, 2, 1024), (8, 8, 512)])
def test_a_layer_keeps_for_its_backward_pass_what_the_arithmetic_says(heads: int, kv_heads: int, inner: int):
    config = {
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    num_tokens = 1024
    kept = [count_kept_bytes(config | {"num_hidden_layers": layers}, num_tokens) for layers in (1, 3)]
    shape = ModelShape.from_config(config | {"num_hidden_layers": 1})
    assert (kept[1] - kept[0]) / 2 / num_tokens == pytest.approx(layer_bytes_per_token(shape, 16), rel=0.08)


def count_kept_bytes(config: dict, num_tokens: int) -> int:
    """Return the bytes that PyTorch saves for the backward pass of a LoRA on a Qwen2, without parameters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from optimizer.training.fused_lora import fuse_lora

    model = Qwen2ForCausalLM(Qwen2Config(**config)).to(torch.bfloat16)
    lora = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    fuse_lora(lora, torch.bfloat16)
    parameters = {it.untyped_storage().data_ptr() for it in lora.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is reused
        return tensor

    ids = torch.arange(num_tokens).reshape(4, -1) % 256
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        lora.get_base_model().model(input_ids=ids, use_cache=False)
    return sum(it.untyped_storage().nbytes() for address, it in kept.items() if address not in parameters)
