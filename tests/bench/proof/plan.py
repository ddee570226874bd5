"""The runs of the proof: task x sequence of methods x seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARED = next(
    (it for above in Path(__file__).parents if (it := above / "shared" / "data").exists()), Path("shared/data")
)
"""Public benchmark data, not in version control: a folder `shared/data` in the repository or above it."""


@dataclass(frozen=True)
class Subject:
    """A model and the tasks that it learns."""

    name: str
    title: str
    model: str
    environment: str
    benchmark: str | None = None
    """What `tasks make` makes the task file of; None: the environment needs no file."""
    source: Path | None = None
    kinds: tuple[str, ...] = ()
    """The kinds of tasks that are kept; empty keeps all."""
    num_demonstrations: int = 0
    """Demonstrations of practice tasks that are imported before the cycle. A model that never wins needs them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the cycle."""
    max_output_tokens: int = 0
    """Of one reply, where there is a task file; more than any right one takes. The bare base writes on to the limit."""

    @property
    def num_played(self) -> int:
        """Practice tasks that the cycle plays: to explore, and to choose a policy by."""
        return self.settings["num_practice_tasks"] + self.settings["num_selection_tasks"]


@dataclass(frozen=True)
class Run:
    """One cycle."""

    subject: Subject
    methods: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        return f"{self.subject.name}-{'-'.join(self.methods)}-{self.seed}"


DEMONSTRATED = {
    "practice_episodes": 0,
    "explore_episodes": 512,
    "num_practice_tasks": 128,
    "num_selection_tasks": 64,
    "evaluation.num_tasks": 200,
    "evaluation.num_sealed_tasks": 0,
    "evaluation.serve_with_memory": False,
}
"""Settings of a cycle that begins with demonstrations."""
SUBJECTS = (
    Subject(
        "bfcl",
        "SmolLM2-135M on BFCL: simple, multiple, live simple",
        model="smollm2",
        environment="bfcl",
        benchmark="bfcl",
        source=SHARED / "bfcl",
        kinds=("simple_python", "multiple", "live_simple"),
        num_demonstrations=200,
        max_output_tokens=160,
        settings=DEMONSTRATED,
    ),
    Subject(
        "beerqa",
        "SmolLM2-135M on BeerQA with the gold paragraphs",
        model="smollm2",
        environment="beerqa",
        benchmark="beerqa",
        source=SHARED / "beerqa_1000" / "beerqa_train_subsample.json",
        num_demonstrations=200,
        max_output_tokens=64,
        settings=DEMONSTRATED,
    ),
    Subject("textworld", "the pocket model on TextWorld", model="pocket", environment="textworld"),
)
SEQUENCES = tuple(("sft", method) for method in ("dpo", "kto", "grpo", "distill", "search"))
SEEDS = (0, 1, 2)


def list_runs(
    subjects: Sequence[Subject] = SUBJECTS,
    sequences: Sequence[tuple[str, ...]] = SEQUENCES,
    seeds: Sequence[int] = SEEDS,
) -> list[Run]:
    """Return all runs: every subject and sequence has one seed before any has two, so that an interrupted proof is
    complete at fewer seeds."""
    return [Run(subject, methods, seed) for seed in seeds for subject in subjects for methods in sequences]
