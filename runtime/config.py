"""The settings of the runtime, one model per section. The defaults are the recommendation.

Invariant: unknown keys are errors. `settings.py` reads the values from files, variables and flags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, StringConstraints, field_validator, model_validator

from memory.config import MemoryConfig
from memory.names import Name
from memory.team import Role


class EngineConfig(BaseModel, extra="forbid"):
    """The vLLM server: its model and its share of the machine."""

    model: str | None = None
    """A Hugging Face id or a directory of the Qwen2/2.5/3, Llama-3 or Mistral families, or the short name of an
    embedded model ("smollm2", "pocket"). None is the model that the data directory's policies are made for; in a new
    directory, smollm2."""
    url: str | None = None
    """Use the vLLM that runs at `http://host:port` instead of starting one; VLLM_API_KEY holds its key, if it has
    one."""
    port: int = Field(default=0, ge=0, le=65535)
    """The engine's port on the loopback; 0 takes a free one."""
    tool_call_parser: str | None = None
    """vLLM's name of the parser; None derives it from the model's chat template and tokenizer."""
    max_model_len: int | None = Field(default=None, ge=1)
    """Maximum length of prompt and answer together, in tokens; None is the model's own limit."""
    # optimizer/placement.py calculates with it whether a training fits beside the engine.
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """Fraction of the GPU's memory for vLLM; ignored on a CPU."""
    kv_cache_gib: int = Field(default=2, ge=1)
    """KV cache on a CPU, in GiB; ignored on a GPU."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Maximum number of requests decoded together."""
    max_num_queued: int | None = Field(default=None, ge=0)
    """Maximum number of turns that wait for those; further ones are rejected. None is half of `max_num_seqs`, so that a
    waiting turn is answered within twice the time."""
    max_loras: int = Field(default=4, ge=1)
    """Maximum number of adapters in one batch."""
    max_cpu_loras: int = Field(default=16, ge=1)
    """Maximum number of adapters in memory."""
    # Not checked here: vLLM refuses other ranks when it starts, and `HotSwap` refuses adapters of a higher one.
    max_lora_rank: int = 32
    """One of 1, 8, 16, 32, 64, 128, 256, 320, 512."""
    startup_seconds: float = Field(default=300.0, gt=0)
    """Maximum time from the engine's start to its first token."""
    probe_interval_seconds: float = Field(default=2.0, gt=0)
    """Pause between two probes of one token each."""
    # Together with the pause above this bounds how long a stuck engine goes unnoticed.
    probe_timeout_seconds: float = Field(default=7.5, gt=0)
    """If a probe gets no token for this long and no other request does either, the engine hangs and is restarted."""
    call_timeout_seconds: float = Field(default=600.0, gt=0)
    """Maximum time without any output of the engine within one call."""
    extra_args: list[str] = Field(default_factory=list)
    """Further arguments for vLLM, as on its command line. Of those of one at `url`, `--chat-template` is read."""

    @property
    def max_turns(self) -> int:
        """Maximum number of concurrent turns: those that the engine decodes together and those that wait for them."""
        waiting = self.max_num_seqs // 2 if self.max_num_queued is None else self.max_num_queued
        return self.max_num_seqs + waiting


class AgentConfig(BaseModel, extra="forbid"):
    """Limits and defaults of one episode. Where a client runs tools itself, the limits apply to each of its
    requests."""

    system_prompt: str = ""
    """Used if neither the request nor the policy has one; empty sends none."""
    max_steps: int = Field(default=24, ge=1)
    """Maximum number of model calls in one episode."""
    max_output_tokens: int | None = Field(default=None, ge=1)
    """Maximum tokens of one model call; requests for more are rejected. None: what the context leaves."""
    default_output_tokens: int = Field(default=2048, ge=1)
    """Maximum tokens of one model call unless the request sets one; at most `max_output_tokens`."""
    max_total_tokens: int = Field(default=200_000, ge=1)
    """Maximum tokens of one episode: the sum over prompts and outputs of all its model calls."""
    # A maintenance window waits so long, and a little more, for the turns under way (serve.py).
    max_seconds: float = Field(default=300.0, gt=0)
    """Maximum duration of an episode, including tools."""
    client_idle_seconds: float = Field(default=1800.0, gt=0)
    """How long an episode waits for a client's tool results before it closes."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """Sampling temperature unless the request or the environment sets one; None is the embedded model's own, and 0.7
    for every other model."""
    team: tuple[Role, ...] = (Role.ACTOR,)
    """The roles in which the policy plays an episode: ["planner", "actor", "checker"], or fewer. The actor alone is a
    single agent."""
    team_plays: Literal["all", "practice"] = "all"
    """The episodes that the team plays; with "practice" a single agent plays all others."""
    max_notes: int = Field(default=1, ge=1)
    """How often the checker may send an answer back in one episode."""

    @field_validator("team")
    @classmethod
    def _require_actor(cls, team: tuple[Role, ...]) -> tuple[Role, ...]:
        if Role.ACTOR not in team:
            raise ValueError('a team needs somebody who answers: add "actor"')
        twice = [role.value for role in Role if team.count(role) > 1]
        if twice:
            raise ValueError(f"{twice[0]!r} is there twice: name each role once")
        return team


class McpServerConfig(BaseModel, extra="forbid"):
    """One MCP server: a command to start here, or the URL of a running server."""

    command: list[str] = Field(default_factory=list)
    """A program with arguments that uses MCP on its standard input and output."""
    url: str | None = Field(default=None, pattern=r"^https?://")
    """The address of a server with streamable HTTP, `https://host/mcp`."""
    env: list[str] = Field(default_factory=list)
    """Names of environment variables that the program gets in addition to PATH, HOME and the like."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Header -> name of the environment variable with its value, so that no secret is in a file."""
    startup_seconds: float = Field(default=60.0, gt=0)
    """Maximum time to its first answer."""
    only: list[str] | None = None
    """The tools to offer, as the server names them; None offers all."""
    prefix: str = Field(default="", pattern=r"^[A-Za-z0-9_-]*$")
    """Prefix for the names of its tools."""

    @model_validator(mode="after")
    def _require_command_or_url(self) -> McpServerConfig:
        if bool(self.command) == (self.url is not None):
            raise ValueError("give either a command or a url")
        if self.command and self.headers:
            raise ValueError("headers need a url")
        if self.url is not None and self.env:
            raise ValueError("env needs a command")
        return self


class ToolLimits(BaseModel, extra="forbid"):
    """Overrides the limits of one tool; None leaves the tool's own."""

    timeout_seconds: float | None = Field(default=None, gt=0)
    """Maximum duration of a call, including the wait for a slot."""
    max_concurrency: int | None = Field(default=None, ge=1)
    """Maximum concurrent calls, of all episodes together."""
    max_output_chars: int | None = Field(default=None, ge=1)
    """Longer results are truncated, with a note for the model."""
    side_effects: bool | None = None
    """Whether it changes anything outside of its episode. If so, practice and evaluation get recorded results only."""
    trusted: bool | None = None
    """Whether you vouch for every text that it returns. No cycle learns from an episode that read untrusted text until
    an operator approves it. Functions, documents and the sandbox are trusted; web pages and MCP servers are not."""


class ToolsConfig(BaseModel, extra="forbid"):
    """The agent's tools in requests without an environment."""

    functions: list[str] = Field(default_factory=list)
    """Python functions: `package.module:function`, or `package.module` for all its public ones."""
    mcp: dict[Annotated[Name, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")], McpServerConfig] = Field(
        default_factory=dict
    )
    """MCP servers by a name of your choice, without dots, which the names of tools cannot contain."""
    documents: bool = False
    """`search_documents`: passages of the stored documents."""
    web: bool = False
    """`fetch_page`: a page of the public web; never an address of your network."""
    python: bool = False
    """`run_python`: code in a sandbox without network; needs bubblewrap."""
    limits: dict[str, ToolLimits] = Field(default_factory=dict)
    """By the tool's name."""


class CriticConfig(BaseModel, extra="forbid"):
    """A model or a program behind a URL that rewards replies (docs/tasks.md)."""

    url: str = Field(pattern=r"^https?://[^@\s]+$")
    """Its address; a private one is the operator's choice."""
    # Checked where it is read: the message for an invalid setting quotes its value, which may be a key by mistake.
    api_key: str | None = None
    """Name of the environment variable that holds its key; None sends none."""
    timeout_seconds: float = Field(default=60.0, gt=0, le=600)
    """Maximum duration of one try."""


class EndpointConfig(BaseModel, extra="forbid"):
    """A model behind an endpoint with OpenAI's chat completions."""

    url: str | None = Field(default=None, pattern=r"^https?://[^@\s]+$")
    """Its address before `/chat/completions`: `https://host/v1`."""
    model: str | None = None
    """The model's name there."""
    # Checked where it is read: the message for an invalid setting quotes its value, which may be a key by mistake.
    api_key: str | None = None
    """Name of the environment variable that holds the endpoint's key; None sends none."""

    @field_validator("url")
    @classmethod
    def _has_a_port(cls, url: str | None) -> str | None:
        if url is not None:
            _ = urlsplit(url).port  # raises ValueError for one that is no number from 0 to 65535
        return url


class CriticModelConfig(EndpointConfig):
    """The model that writes insights and scores rubrics. It is sent what people said in the episodes that it reads.
    Without one it is the served base, unless that is an embedded model."""

    context_tokens: int | None = Field(default=None, ge=1)
    """How many tokens it can hold, prompt and answer together; None counts on 8,192."""
    timeout_seconds: float = Field(default=120.0, gt=0, le=600)
    """Maximum duration of one answer, all tries included."""

    @model_validator(mode="after")
    def _require_url_and_model(self) -> CriticModelConfig:
        if (self.url is None) != (self.model is None):
            raise ValueError("give both url and model, or neither")
        return self


class EnvironmentConfig(BaseModel, extra="forbid", validate_by_name=True, validate_by_alias=True):
    """One environment beside TextWorld: a task file, or a class; neither names a plug-in, by the section's name."""

    tasks: Path | None = None
    """A JSONL file of tasks with graders (docs/tasks.md)."""
    functions: dict[str, str] = Field(default_factory=dict)
    """Python functions that the file's grader "function" may name: name -> `package.module:function`."""
    critics: dict[Name, CriticConfig] = Field(default_factory=dict)
    """Critics that the file's grader "url" may name."""
    system_prompt: str = ""
    """Of the file's tasks that bring no system message."""
    temperature: float | None = Field(default=0.0, ge=0, le=2)
    """Sampling temperature of the file's tasks. Above 0 the release gate tries each of them several times."""
    max_output_tokens: int = Field(default=1024, ge=1)
    """Maximum tokens of one model call in the file's tasks, unless the request sets one."""
    class_path: str | None = Field(default=None, alias="class")
    """A class of yours: `package.module:Class`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""

    @model_validator(mode="after")
    def _is_one_kind(self) -> EnvironmentConfig:
        if self.tasks is not None and (self.class_path is not None or self.options):
            raise ValueError("give either tasks, or a class with options")
        of_a_file = self.model_fields_set & {
            "functions",
            "critics",
            "system_prompt",
            "temperature",
            "max_output_tokens",
        }
        if self.tasks is None and of_a_file:
            raise ValueError(f"{min(of_a_file)} belongs to a task file: give tasks, or leave it to the class")
        return self


class TeacherConfig(EndpointConfig):
    """The model that `serve.py teach` has play practice tasks."""

    max_tokens: int = Field(default=1_000_000, ge=1)
    """Budget of one run, in tokens of prompts and replies together."""
    max_cost: float | None = Field(default=None, gt=0)
    """Budget of one run, in the currency of the prices; None bounds the tokens alone."""
    prompt_price: float | None = Field(default=None, ge=0)
    """Price of a million tokens of prompts."""
    output_price: float | None = Field(default=None, ge=0)
    """Price of a million tokens of replies."""

    @model_validator(mode="after")
    def _require_prices(self) -> TeacherConfig:
        if (self.prompt_price is None) != (self.output_price is None):
            raise ValueError("give both prompt_price and output_price, or neither")
        if self.max_cost is not None and self.prompt_price is None:
            raise ValueError("max_cost needs prompt_price and output_price, per million tokens")
        return self


class LimitsConfig(BaseModel, extra="forbid"):
    """Maximum sizes of a request. Larger ones are rejected, mostly before they are read."""

    # Also the limit of a whole conversation of stored responses; BODIES_AT_ONCE of them may be in memory at once.
    max_body_bytes: int = Field(default=16 * 2**20, ge=1)
    """Maximum size of a body."""
    max_json_depth: int = Field(default=100, ge=1)
    """Maximum nesting of lists and objects in a body."""
    max_json_values: int = Field(default=100_000, ge=1)
    """Maximum number of values in a body: texts, numbers, lists, objects."""
    max_messages: int = Field(default=4096, ge=1)
    """Maximum number of messages of one conversation, including those of earlier responses."""
    body_seconds: float = Field(default=60.0, gt=0)
    """Maximum time for a whole body to arrive."""
    max_connections: int = Field(default=1024, ge=1)
    """Maximum number of concurrent connections."""


class ServerConfig(BaseModel, extra="forbid"):
    """The API's address, and the requests that it accepts."""

    host: str = "127.0.0.1"
    """The loopback by default; any other address needs keys (`serve.py keys create`)."""
    port: int = Field(default=8080, ge=0, le=65535)
    """0 takes a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names of the server in addition to `host` and the loopback's: `agent.example.com`."""
    # Compared as whole strings: with scheme and port, and without a slash at the end.
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the server from a browser: `https://app.example.com`."""
    limits: LimitsConfig = LimitsConfig()


class RuntimeSettings(BaseModel, extra="forbid"):
    """All settings but the optimizer's: what a server needs to answer."""

    data: Path = Path(".ratchet")
    memory: MemoryConfig = MemoryConfig()
    engine: EngineConfig = EngineConfig()
    agent: AgentConfig = AgentConfig()
    tools: ToolsConfig = ToolsConfig()
    environments: dict[Name, EnvironmentConfig] = Field(default_factory=dict)
    """Environments beside TextWorld, by name. The names are stored with every episode."""
    server: ServerConfig = ServerConfig()
    teacher: TeacherConfig = TeacherConfig()
    critic: CriticModelConfig = CriticModelConfig()
