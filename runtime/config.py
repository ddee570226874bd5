"""What answers, and within which limits.

Refuses to know how settings are read from files or flags. The defaults are the recommendation.
"""

from __future__ import annotations

from pydantic import BaseModel, Field


class EngineConfig(BaseModel, extra="forbid"):
    """The vLLM server: which model, how much of the machine."""

    model: str | None = None
    """A Hugging Face id or a directory of the Qwen2/2.5/3, Llama-3 or Mistral families; None is the pocket model."""
    url: str | None = None
    """Use the vLLM that already runs here, `http://host:port`, and start none."""
    port: int = Field(default=0, ge=0, le=65535)
    """The engine's port on the loopback; 0 takes a free one."""
    tool_call_parser: str | None = None
    """vLLM's name of the parser; None chooses by the model's family."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt and answer together, in tokens; None is the model's own limit."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """Share of the GPU's memory that vLLM may take; no meaning on a CPU."""
    kv_cache_gib: int = Field(default=2, ge=1)
    """Memory for attention on a CPU, in GiB; no meaning on a GPU."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most requests decoded together."""
    max_num_queued: int = Field(default=1024, ge=1)
    """Most requests waiting in the engine; beyond it refuses."""
    max_loras: int = Field(default=4, ge=1)
    """Most adapters in one batch."""
    max_cpu_loras: int = Field(default=16, ge=1)
    """Most adapters kept in memory."""
    max_lora_rank: int = 32
    """One of 1, 8, 16, 32, 64, 128, 256, 320, 512."""
    startup_seconds: float = Field(default=300.0, gt=0)
    """How long the engine may take to its first token."""
    probe_interval_seconds: float = Field(default=2.0, gt=0)
    """Pause between two probes of one token each."""
    probe_timeout_seconds: float = Field(default=8.0, gt=0)
    """A probe without a token for this long, while no other token moves either, means a zombie."""
    call_timeout_seconds: float = Field(default=600.0, gt=0)
    """The longest silence of the engine within one call."""
    extra_args: list[str] = Field(default_factory=list)
    """Further arguments for vLLM, as on its command line."""


class AgentConfig(BaseModel, extra="forbid"):
    """Limits of one episode, and what it falls back on. Where a client runs tools, they hold for each of its requests:
    how often it comes back is its own affair."""

    system_prompt: str = ""
    """For requests that bring none, under a policy that has none; empty sends none."""
    max_steps: int = Field(default=24, ge=1)
    """Most model calls in one episode."""
    max_output_tokens: int = Field(default=512, ge=1)
    """Most tokens of one model call."""
    max_total_tokens: int = Field(default=200_000, ge=1)
    """Most tokens of one episode, the prompts and outputs of all its model calls together."""
    max_seconds: float = Field(default=300.0, gt=0)
    """Longest episode, tools included."""
    client_idle_seconds: float = Field(default=1800.0, gt=0)
    """How long an episode waits for a client to come back with the results of its tools; then it closes."""
    temperature: float = Field(default=0.7, ge=0, le=2)
    """Where the request names none."""


class ServerConfig(BaseModel, extra="forbid"):
    """Where the API listens."""

    host: str = "127.0.0.1"
    """The loopback by default: nobody is asked who they are."""
    port: int = Field(default=8080, ge=0, le=65535)
    """0 takes a free one."""
