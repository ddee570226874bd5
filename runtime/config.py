"""What answers, and within which limits.

Refuses to know how settings are read from files or flags. The defaults are the recommendation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, StringConstraints, model_validator

from memory.config import MemoryConfig
from memory.names import Name


class EngineConfig(BaseModel, extra="forbid"):
    """The vLLM server: which model, how much of the machine."""

    model: str | None = None
    """A Hugging Face id or a directory of the Qwen2/2.5/3, Llama-3 or Mistral families; None is the pocket model."""
    url: str | None = None
    """Use the vLLM that already runs here, `http://host:port`, and start none; its key, if any, is in VLLM_API_KEY."""
    port: int = Field(default=0, ge=0, le=65535)
    """The engine's port on the loopback; 0 takes a free one."""
    tool_call_parser: str | None = None
    """vLLM's name of the parser; None chooses by the model's chat template and tokenizer."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest prompt and answer together, in tokens; None is the model's own limit."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """Share of the GPU's memory that vLLM may take; no meaning on a CPU."""
    kv_cache_gib: int = Field(default=2, ge=1)
    """Memory for attention on a CPU, in GiB; no meaning on a GPU."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most requests decoded together."""
    max_num_queued: int | None = Field(default=None, ge=0)
    """Most turns that wait for those, beyond which clients are turned away; None is half of `max_num_seqs`, so that who
    waits is still answered within twice the time."""
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
    probe_timeout_seconds: float = Field(default=7.5, gt=0)
    """A probe without a token for this long, while no other token moves either, means a zombie: found within this and
    the pause before it."""
    call_timeout_seconds: float = Field(default=600.0, gt=0)
    """The longest silence of the engine within one call."""
    extra_args: list[str] = Field(default_factory=list)
    """Further arguments for vLLM, as on its command line."""

    @property
    def max_turns(self) -> int:
        """Most turns under way at once: those the engine decodes together, and those that wait for them."""
        waiting = self.max_num_seqs // 2 if self.max_num_queued is None else self.max_num_queued
        return self.max_num_seqs + waiting


class AgentConfig(BaseModel, extra="forbid"):
    """Limits of one episode, and what it falls back on. Where a client runs tools, they hold for each of its requests:
    how often it comes back is its own affair."""

    system_prompt: str = ""
    """For requests that bring none, under a policy that has none; empty sends none."""
    max_steps: int = Field(default=24, ge=1)
    """Most model calls in one episode."""
    max_output_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of one model call; a request that asks for more is refused. None: what the context leaves."""
    default_output_tokens: int = Field(default=2048, ge=1)
    """Most tokens of one model call where the request names no number, within `max_output_tokens`."""
    max_total_tokens: int = Field(default=200_000, ge=1)
    """Most tokens of one episode, the prompts and outputs of all its model calls together."""
    max_seconds: float = Field(default=300.0, gt=0)
    """Longest episode, tools included."""
    client_idle_seconds: float = Field(default=1800.0, gt=0)
    """How long an episode waits for a client to come back with the results of its tools; then it closes."""
    temperature: float = Field(default=0.7, ge=0, le=2)
    """Where the request names none."""


class McpServerConfig(BaseModel, extra="forbid"):
    """One MCP server: a command that is started here, or the URL of one that runs."""

    command: list[str] = Field(default_factory=list)
    """The program and its arguments; it speaks MCP on its standard input and output."""
    url: str | None = Field(default=None, pattern=r"^https?://")
    """Where one answers over streamable HTTP, `https://host/mcp`."""
    env: list[str] = Field(default_factory=list)
    """Names of environment variables that the program gets besides PATH, HOME and the like."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Header -> the name of the environment variable that holds its value: a secret is never in a file."""
    startup_seconds: float = Field(default=60.0, gt=0)
    """How long it may take to answer first."""
    only: list[str] | None = None
    """The tools to offer, as the server names them; None offers all."""
    prefix: str = Field(default="", pattern=r"^[A-Za-z0-9_-]*$")
    """Put before the names of its tools."""

    @model_validator(mode="after")
    def _is_one_of_two(self) -> McpServerConfig:
        if bool(self.command) == (self.url is not None):
            raise ValueError("give either a command or a url")
        if self.command and self.headers:
            raise ValueError("headers need a url")
        if self.url is not None and self.env:
            raise ValueError("env needs a command")
        return self


class ToolLimits(BaseModel, extra="forbid"):
    """What one tool may take; None leaves what the tool came with."""

    timeout_seconds: float | None = Field(default=None, gt=0)
    """Longest call, the wait for a place included."""
    max_concurrency: int | None = Field(default=None, ge=1)
    """Most calls at once, of all episodes together."""
    max_output_chars: int | None = Field(default=None, ge=1)
    """What is longer is cut, and the model told so."""
    side_effects: bool | None = None
    """Whether it changes anything outside of its episode. Then practice and evaluation get what was recorded of it."""
    trusted: bool | None = None
    """Whether you answer for every text that it returns. An episode that read untrusted text teaches nothing until an
    operator approves it. Functions, documents and the sandbox are trusted; web pages and MCP servers are not."""


class ToolsConfig(BaseModel, extra="forbid"):
    """What the agent can do besides talk, in requests that name no environment."""

    functions: list[str] = Field(default_factory=list)
    """Python functions: `package.module:function`, or `package.module` for all its public ones."""
    mcp: dict[Annotated[Name, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")], McpServerConfig] = Field(
        default_factory=dict
    )
    """MCP servers, by a name of yours. It begins the names of their tools, in which no API takes a dot."""
    documents: bool = False
    """`search_documents`: passages of what the agent was given to read."""
    web: bool = False
    """`fetch_page`: a page of the public web; never an address of your network."""
    python: bool = False
    """`run_python`: code in a sandbox without network; needs bubblewrap."""
    limits: dict[str, ToolLimits] = Field(default_factory=dict)
    """By the tool's name."""


class LimitsConfig(BaseModel, extra="forbid"):
    """How large a request may be. What is larger is refused, mostly before it is read."""

    max_body_bytes: int = Field(default=16 * 2**20, ge=1)
    """Longest body."""
    max_json_depth: int = Field(default=100, ge=1)
    """Deepest nesting of lists and objects in a body."""
    max_json_values: int = Field(default=100_000, ge=1)
    """Most values in a body: texts, numbers, lists, objects."""
    max_messages: int = Field(default=4096, ge=1)
    """Most messages of one conversation, those of earlier responses included."""
    body_seconds: float = Field(default=60.0, gt=0)
    """The longest time for a whole body to arrive."""
    max_connections: int = Field(default=1024, ge=1)
    """Most connections at once."""


class ServerConfig(BaseModel, extra="forbid"):
    """Where the API listens, and what it takes."""

    host: str = "127.0.0.1"
    """The loopback by default; any other address needs keys (`serve.py keys create`)."""
    port: int = Field(default=8080, ge=0, le=65535)
    """0 takes a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Names under which clients reach the server, besides `host` and the loopback's: `agent.example.com`."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may use the server from a browser, by origin: `https://app.example.com`."""
    limits: LimitsConfig = LimitsConfig()


class RuntimeSettings(BaseModel, extra="forbid"):
    """All settings but the optimizer's: what a server needs to answer."""

    data: Path = Path(".ratchet")
    memory: MemoryConfig = MemoryConfig()
    engine: EngineConfig = EngineConfig()
    agent: AgentConfig = AgentConfig()
    tools: ToolsConfig = ToolsConfig()
    server: ServerConfig = ServerConfig()
