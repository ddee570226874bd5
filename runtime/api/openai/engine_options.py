"""Parameters of vLLM that OpenAI's APIs do not have; both APIs pass them to the engine unchanged."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
"""vLLM's levels of reasoning effort; a model that does not reason ignores it."""


class EngineOptions(BaseModel):
    """Sampling parameters that OpenAI's API does not have."""

    top_k: int | None = Field(default=None, ge=-1, description="0 and -1: all tokens.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = Field(
        default=None, description='Variables of the chat template, as {"enable_thinking": false}.'
    )

    def engine_options(self) -> dict[str, Any]:
        """Return the parameters that the request sets."""
        # Of this class, not `type(self)`: a request's own class has all other parameters too.
        return {name: value for name in EngineOptions.model_fields if (value := getattr(self, name)) is not None}
