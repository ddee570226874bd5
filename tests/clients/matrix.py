"""The clients that are run, and how each is installed and started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
NODE = HERE / "node"


@dataclass(frozen=True)
class Client:
    """One client: its script, and the package whose version the table shows."""

    name: str
    script: Path
    package: str | None = None

    @property
    def is_node(self) -> bool:
        return self.script.suffix == ".mjs"

    @property
    def requirements(self) -> Path | None:
        """The pinned packages of a Python client; None for one that needs none."""
        return None if self.is_node or self.package is None else HERE / "requirements" / f"{self.package}.txt"


def _python(package: str, name: str | None = None) -> Client:
    return Client(name or package, HERE / "scripts" / f"with_{package.replace('-', '_')}.py", package)


CLIENTS = (
    _python("openai", "openai (Python)"),
    Client("openai (node)", NODE / "with_openai.mjs", "openai"),
    _python("anthropic", "anthropic (Python)"),
    Client("anthropic (node)", NODE / "with_anthropic.mjs", "@anthropic-ai/sdk"),
    _python("openai-agents"),
    _python("pydantic-ai"),
    _python("litellm"),
    _python("llm"),
    _python("instructor"),
    _python("smolagents"),
    _python("langchain"),
    _python("dspy"),
    _python("inspect-ai"),
    _python("autogen"),
    _python("crewai"),
    Client("AI SDK (node)", NODE / "with_ai_sdk.mjs", "ai"),
    Client("curl", HERE / "scripts" / "with_curl.py"),
)
DISTRIBUTIONS = {"pydantic-ai": "pydantic-ai-slim", "autogen": "autogen-agentchat"}
"""Distributions whose name differs from the client's."""
