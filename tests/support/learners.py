"""A learner as `serve.py` makes it, for tests with their own memory and seams."""

from __future__ import annotations

from memory.store import Memory
from optimizer.config import OptimizerConfig
from optimizer.learner import Learner
from optimizer.seams import Seams
from runtime.settings import overlay


def make_learner(memory: Memory, config: OptimizerConfig, seams: Seams, *, environment: str | None = None) -> Learner:
    return Learner(memory, config, seams, overlay=overlay, environment=environment)
