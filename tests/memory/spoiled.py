"""Ways to damage an adapter's directory, each with the reason for its rejection.

The manifest is written again after the damage, so that a wrong digest does not hide the other checks.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy
from safetensors.numpy import load_file, save_file

from memory.adapters import read_manifest, write_manifest

A, B = "base_model.model.layers.0.q.lora_A.weight", "base_model.model.layers.0.q.lora_B.weight"


def vouch(directory: Path) -> Path:
    """Write the manifest again, with the digests of the present files."""
    write_manifest(directory, read_manifest(directory))
    return directory


def write_safetensors(path: Path, header: object, data: bytes) -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def corrupt_weights(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate_weights(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    vouch(directory)


def empty_weights(directory: Path) -> None:
    (directory / "adapter_model.safetensors").write_bytes(b"")
    vouch(directory)


def huge_header(directory: Path) -> None:
    (directory / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    vouch(directory)


def list_header(directory: Path) -> None:
    write_safetensors(directory / "adapter_model.safetensors", [], b"")
    vouch(directory)


def overlapping_tensors(directory: Path) -> None:
    spec = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    write_safetensors(directory / "adapter_model.safetensors", {A: spec, B: spec}, b"\x01" * 16)
    vouch(directory)


def pickle_beside(directory: Path) -> None:
    (directory / "adapter_model.bin").write_bytes(b"pickle")


def link_inside(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.rename(directory.parent / "elsewhere")
    path.symlink_to(directory.parent / "elsewhere")


def directory_inside(directory: Path) -> None:
    (directory / "ref").mkdir()


def no_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def manifest_not_json(directory: Path) -> None:
    (directory / "manifest.json").write_text("{")


def manifest_of_the_future(directory: Path) -> None:
    rewrite(directory, format=2)


def manifest_vouches_for_too_little(directory: Path) -> None:
    rewrite(directory, files={"adapter_config.json": "0"})


def manifest_leads_outside(directory: Path) -> None:
    rewrite(directory, files={"../../etc/passwd": "0", "adapter_config.json": "0"})


def other_base(directory: Path) -> None:
    rewrite(directory, base_digest="another")


def rewrite(directory: Path, **fields) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def pickle_instead(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def link_to_outside(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()
    (directory / "adapter_config.json").symlink_to("/etc/hostname")


def nan_weights(directory: Path) -> None:
    replace_weights(directory, A, lambda array: numpy.full_like(array, numpy.nan))


def rank_too_large(directory: Path) -> None:
    replace_weights(directory, A, lambda array: numpy.ones((99, 128), "float32"))


def config_with_rank_too_large(directory: Path) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 64}))
    vouch(directory)


def replace_weights(directory: Path, name: str, change) -> None:
    path = directory / "adapter_model.safetensors"
    weights = load_file(path)
    save_file(weights | {name: change(weights[name])}, path)
    vouch(directory)


DAMAGES = [
    (corrupt_weights, "not the file its manifest vouches for"),
    (truncate_weights, "truncated"),
    (empty_weights, "truncated or not safetensors"),
    (huge_header, "its header would have"),
    (list_header, "not a JSON object"),
    (overlapping_tensors, "overlap"),
    (pickle_beside, "does not belong in an adapter"),
    (link_inside, "not a plain file"),
    (directory_inside, "not a plain file"),
    (no_manifest, "lacks 'manifest.json'"),
    (manifest_not_json, "is not JSON"),
    (manifest_of_the_future, "is not a manifest: format"),
    (manifest_vouches_for_too_little, "vouches for"),
    (manifest_leads_outside, "vouches for"),
    (other_base, "was made for base"),
    (pickle_instead, "adapter_model.bin"),
    (link_to_outside, "not a plain file"),
    (nan_weights, "not finite"),
    (rank_too_large, "has rank 99"),
    (config_with_rank_too_large, "rank 64"),
]
