"""Tiny generated models: the three families' shapes with random weights, and memorised replies.

They serve only tests of the engine: two layers, a byte-level vocabulary, seconds to make.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from memory.adapters import Fingerprint, Manifest, digest_base, write_manifest

FAMILIES: dict[str, type[PretrainedConfig]] = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
}

CHAT_TEMPLATE = (
    "{%- if tools %}<tools>{% for tool in tools %}{{ tool.function.name }};{% endfor %}</tools>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{%- for c in (m.tool_calls or []) %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{%- endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: one token a byte, five control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[
            "<|im_start|>",
            "<|python_tag|>",
            "[TOOL_CALLS]",
        ],  # required by the parsers of Llama and Mistral
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(path: Path, *, family: str = "qwen2", seed: int = 0) -> Path:
    """Write a random model of `family` with its tokenizer to `path`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = FAMILIES[family](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


Lesson = tuple[list[dict[str, Any]], list[dict[str, Any]] | None, str]
"""Messages, tools, and the reply to learn."""


def teach(path: Path, lessons: list[Lesson]) -> Path:
    """Overfit the model at `path` until it returns each lesson's reply exactly."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids, labels, mask = _batch([_row(tokenizer, *lesson) for lesson in lessons], tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(300):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def _row(tokenizer, messages, tools, reply: str) -> tuple[list[int], list[int]]:
    prompt = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    reply_ids = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt_ids + reply_ids, [-100] * len(prompt_ids) + reply_ids


def _batch(rows: list[tuple[list[int], list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return ids, labels, mask


def make_adapters(base: Path, paths: list[Path], *, rank: int = 8, size: float = 0.02) -> list[dict[str, Any]]:
    """Write a random LoRA for `base` to each path; return for each the log-probs that prove it is active."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    probe = torch.tensor([PROBE_IDS])
    before = _logprobs(model, probe)
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    worn = get_peft_model(model, settings).to(torch.bfloat16)
    fingerprints = []
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        for name, parameter in worn.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=size if "lora_B" in name else 0.1)
        worn.save_pretrained(path)
        (path / "README.md").unlink(missing_ok=True)
        after = _logprobs(worn, probe)
        fingerprints.append({"token_ids": PROBE_IDS, "base_logprobs": before, "adapter_logprobs": after})
    return fingerprints


def make_proved_adapters(base: Path, home: Path, *, name: str, num: int) -> list[Path]:
    """Write `num` random adapters, each with the manifest that proves it, as a trainer writes them."""
    paths = [home / f"{name}-v{version}" for version in range(1, num + 1)]
    for version, fingerprint in enumerate(make_adapters(base, paths), start=1):
        values = {"name": name, "version": version, "base_model": name, "kind": "sft"}
        values |= {"base_digest": digest_base(base), "fingerprint": Fingerprint(**fingerprint)}
        write_manifest(paths[version - 1], Manifest(**values))
    return paths


PROBE_IDS = [72, 69, 76, 76, 79, 12, 0, 87, 79, 82, 76, 68, 5, 9, 33, 41]


@torch.no_grad()
def _logprobs(model, ids: torch.Tensor) -> list[float]:
    logits = model(input_ids=ids).logits.float().log_softmax(-1)
    return logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0].tolist()


def tool_call_text(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
