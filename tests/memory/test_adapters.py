"""Adapter directories: written atomically, and rejected for every kind of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from memory.adapters import (
    Manifest,
    digest_adapter,
    digest_base,
    digest_chat_template,
    digest_tokenizer,
    verify_adapter,
    write_adapter_atomically,
    write_manifest,
)
from memory.errors import AdapterRefused
from tests.memory.spoiled import DAMAGES, A, B, vouch, write_safetensors

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q"], "rank_pattern": {}}


def tensors(**changes) -> dict[str, numpy.ndarray]:
    return {A: numpy.ones((4, 16), "float32"), B: numpy.full((16, 4), 0.5, "float32")} | changes


def make_adapter(directory: Path, *, weights: dict | None = None, config: dict | None = None, **fields) -> Path:
    """Write a tiny adapter as a trainer does; the manifest covers the test's changes."""
    directory.mkdir(parents=True)
    save_file(tensors() if weights is None else weights, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | (config or {})))
    values = {"name": "pocket", "version": 1, "base_model": "pocket", "base_digest": "base", "kind": "sft"}
    write_manifest(directory, Manifest(**values | fields))
    return directory


def refused(directory: Path) -> str:
    with pytest.raises(AdapterRefused) as caught:
        verify_adapter(directory, base_digest="base", max_rank=8)
    return str(caught.value)


def test_a_sound_adapter_passes_and_says_where_it_comes_from(tmp_path: Path):
    made = make_adapter(tmp_path / "tmp", trajectory_ids=["t1"], parent=0, seeds={"sft": 7}, metrics={"loss": 0.1})
    final = write_adapter_atomically(made, tmp_path / "adapters" / "pocket-v1")
    manifest = verify_adapter(final, base_digest="base", max_rank=8)
    assert (manifest.trajectory_ids, manifest.parent, manifest.seeds) == (["t1"], 0, {"sft": 7})
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert not made.exists() and len(digest_adapter(final)) == 64


def test_bfloat16_weights_pass(tmp_path: Path):
    directory = make_adapter(tmp_path / "a")
    write_bfloat16(directory / "adapter_model.safetensors", 0x3F80)
    assert verify_adapter(vouch(directory), base_digest="base", max_rank=8).name == "pocket"
    write_bfloat16(directory / "adapter_model.safetensors", 0x7FC0)
    assert "not finite" in refused(vouch(directory))
    write_bfloat16(directory / "adapter_model.safetensors", 0x8000)  # minus zero
    assert "changes nothing" in refused(vouch(directory))


def write_bfloat16(path: Path, bits: int) -> None:
    data = numpy.full(16, bits, "<u2").tobytes()
    spans = {A: [0, 16], B: [16, 32]}
    header = {name: {"dtype": "BF16", "shape": [2, 4], "data_offsets": span} for name, span in spans.items()}
    write_safetensors(path, header, data)


def test_a_name_is_used_once_and_a_half_written_one_is_not_moved(tmp_path: Path):
    final = write_adapter_atomically(make_adapter(tmp_path / "a"), tmp_path / "v1")
    with pytest.raises(FileExistsError, match="take a new version"):
        write_adapter_atomically(make_adapter(tmp_path / "b"), final)
    (tmp_path / "c").mkdir()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        write_adapter_atomically(tmp_path / "c", tmp_path / "v2")


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (tensors(**{B: numpy.zeros((16, 4), "float32")}), "changes nothing"),
        (tensors(**{A: numpy.full((4, 16), numpy.nan, "float32")}), "not finite"),
        (tensors(**{B: numpy.full((16, 4), numpy.inf, "float16")}), "not finite"),
        (tensors(**{A: numpy.ones((9, 16), "float32")}), "rank 9, over the engine's 8"),
        (tensors(**{A: numpy.ones((4, 16), "int32")}), "not described as a float tensor"),
        (tensors(**{A: numpy.ones((4, 4, 1), "float32")}), "not part of a plain LoRA"),
        (tensors(**{"lm_head.weight": numpy.ones((4, 4), "float32")}), "not part of a plain LoRA"),
        ({}, "changes nothing"),
    ],
)
def test_bad_weights_are_refused(tmp_path: Path, weights: dict, reason: str):
    assert reason in refused(make_adapter(tmp_path / "a", weights=weights))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 16}, "rank 16"),
        ({"r": None}, "rank None"),
        ({"rank_pattern": {"q": 64}}, "rank 64"),
    ],
)
def test_a_config_the_engine_cannot_serve_is_refused(tmp_path: Path, config: dict, reason: str):
    assert reason in refused(make_adapter(tmp_path / "a", config=config))


@pytest.mark.parametrize(
    ("damage", "reason"),
    DAMAGES,
)
def test_a_damaged_directory_is_refused(tmp_path: Path, damage: Callable[[Path], None], reason: str):
    directory = make_adapter(tmp_path / "a")
    damage(directory)
    message = refused(directory)
    assert reason in message and str(tmp_path) in message


def test_what_is_no_directory_is_refused(tmp_path: Path):
    make_adapter(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert "not a directory" in refused(tmp_path / "link")
    assert "not a directory" in refused(tmp_path / "missing")
    assert "leads through '..'" in refused(tmp_path / "x" / ".." / "a")


def test_digests_tell_bases_and_tokenizers_apart(tmp_path: Path):
    for name, width in (("a", 192), ("b", 256)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"hidden_size": width, "layers": 5}))
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 10)
        (tmp_path / name / "tokenizer.json").write_text(name)
    assert digest_base(tmp_path / "a") != digest_base(tmp_path / "b")
    assert digest_tokenizer(tmp_path / "a") != digest_tokenizer(tmp_path / "b")
    before = digest_base(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text('{"layers": 5,  "hidden_size": 192}')
    assert digest_base(tmp_path / "a") == before
    (tmp_path / "a" / "model.safetensors").write_bytes(b"x" * 11)
    assert digest_base(tmp_path / "a") != before
    assert digest_chat_template("{{ a }}") != digest_chat_template("{{ b }}")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        digest_base(tmp_path)
