"""The command line and the environment of the vLLM server that this project starts.

Invariant: the server listens on the loopback only, whatever the extra arguments say.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

from runtime.config import EngineConfig
from runtime.engine.cpu_workarounds import idle_wait
from runtime.engine.tool_format import choose_tool_call_parser, read_chat_template

HOME = Path(__file__).parents[2]
TOOL_CALLS = Path(__file__).with_name("tool_call_grammar.py")
COMPACT_JSON = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
"""Small models fill JSON with white space until the length limit. Only two of vLLM's backends can forbid it, and of
them only xgrammar has grammars for tool calls."""
CPU_FIX = "runtime.engine.cpu_workarounds.worker.WorkerFixes"
CPU_BLOCK_TOKENS = 32
"""Block size of the prefix cache, which finds whole blocks only: with vLLM's 128, each turn would compute most of a
block anew."""
KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM reads its API key from this variable. Other users of the machine can read arguments, but not the environment.
The key guards all routes under /v1."""
BASE = "base"
"""The name under which the bare base model is served."""


def server_arguments(config: EngineConfig, model_path: Path, port: int) -> list[str]:
    """Return the arguments of vLLM's server for the model in `model_path`."""
    template = read_chat_template(model_path, config.extra_args)
    parser = config.tool_call_parser or choose_tool_call_parser(model_path, template)
    arguments = {
        "model": model_path,
        "served-model-name": BASE,
        "max-loras": config.max_loras,
        "max-cpu-loras": max(config.max_cpu_loras, config.max_loras),  # vLLM refuses fewer than max-loras
        "max-lora-rank": config.max_lora_rank,
        "tool-call-parser": parser,
        "tool-parser-plugin": TOOL_CALLS,
        # Grammars for Mistral's own tokenizer need another backend, which only vLLM's automatic choice takes.
        "structured-outputs-config": None if (model_path / "tekken.json").is_file() else COMPACT_JSON,
        "scheduling-policy": "priority",  # `EngineClient.has_priorities` relies on it
        # Without max-num-queued-reqs: vLLM counts running requests there too and rejects in the middle of an episode.
        # admission.py counts turns instead.
        "max-num-seqs": config.max_num_seqs,
        "generation-config": "vllm",  # or the model's own sampling defaults would apply
        "max-model-len": config.max_model_len,
    }
    flags = ["enable-lora", "enable-auto-tool-choice", "disable-uvicorn-access-log"]
    if is_cpu_build():
        arguments["dtype"] = "bfloat16"
        arguments["worker-extension-cls"] = CPU_FIX
        arguments["block-size"] = CPU_BLOCK_TOKENS
        flags.append("enforce-eager")
    else:
        arguments["gpu-memory-utilization"] = config.gpu_memory_utilization
    options = [part for key, value in arguments.items() if value is not None for part in (f"--{key}", str(value))]
    # Last, so that no extra argument overrides it: several of vLLM's routes need no key.
    address = ["--host", "127.0.0.1", "--port", str(port)]
    return [*options, *(f"--{flag}" for flag in flags), *config.extra_args, *address]


def server_environment(config: EngineConfig) -> dict[str, str]:
    """Return the variables that the server has beyond this process's own."""
    return {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib),
        "VLLM_LOGGING_LEVEL": "INFO",  # `Engine` follows the start in the log; a library may have changed the level
        "VLLM_NO_USAGE_STATS": "1",
        **({idle_wait.MARK: "1"} if is_cpu_build() else {}),
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a local directory
        "PYTHONUNBUFFERED": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the order of nvidia-smi, which the trainer uses too
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HOME), os.environ.get("PYTHONPATH")))),  # for CPU_FIX
    }


def is_cpu_build() -> bool:
    """Return whether the installed vLLM is the one for CPUs."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
