"""The optimizer's settings: how much to play, what to learn from, the bars of a promotion.

The defaults are the recommendation. `optimizer.recipes` has the numbers of a training.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from memory.names import Name, NameOrEmpty
from optimizer.recipes import FIRST_METHOD, METHOD_NAMES, Recipe, choose_recipe, plan_steps


def plan_rounds(num_episodes: int, num_tasks: int) -> list[int]:
    """Return how many tasks each round of practice plays; only the last round may be shorter."""
    num_rounds = math.ceil(num_episodes / num_tasks)
    return [min(num_tasks, num_episodes - number * num_tasks) for number in range(num_rounds)]


class DemonstrationConfig(BaseModel, extra="forbid"):
    """Which successes are imitated."""

    per_task: int = 2
    """At most so many episodes of one task, the shortest first."""
    keep_memory_share: float = Field(default=0.15, ge=0, le=1)
    """Share of rows that keep their memory segment, or the model unlearns to use it."""
    min_rows: int = 16
    """With fewer, the cycle ends with an error that says how many are missing."""
    max_rows: int = 2000


class PreferenceConfig(BaseModel, extra="forbid"):
    """Which (prompt, chosen, rejected) rows are built."""

    per_task: int = 8
    scope: Literal["remainder", "step"] = "step"
    """"step": both sides end with the step that is weighed. "remainder": they run to the end of the episode (ETO), or
    to where the chat template breaks it into another row; the loss can then be met by making the loser's later steps
    unlikely, and leave the decision as it was."""
    loss: Literal["sigmoid", "sigmoid_norm", "dmpo"] = "sigmoid"
    """How DPO weighs the tokens of a side. "sigmoid": all alike, so a longer side weighs more. "sigmoid_norm": by the
    mean of its tokens; it takes a larger `recipe.dpo_beta`, about 2. "dmpo": by turns, the earlier ones more, and as
    much for a short side as for a long one (arXiv 2406.14868); it needs sides of several turns."""
    discount: float = Field(default=0.7, gt=0, lt=1)
    """DMPO: how fast the weight falls from turn to turn; near 0 the first turn alone counts."""
    max_extra_rounds: int = 5
    """The rejected side may take at most so many more model steps than the chosen one; it is cut there."""
    min_rows: int = 12
    """With fewer there is no DPO: the SFT policy itself becomes the candidate."""
    max_rows: int = 2000

    @model_validator(mode="after")
    def _has_turns_to_weigh(self) -> PreferenceConfig:
        if self.loss == "dmpo" and self.scope == "step":
            raise ValueError(
                "preferences.loss = 'dmpo' weighs the turns of a side, and preferences.scope = 'step' leaves one: set "
                "the scope to 'remainder'"
            )
        return self


class LabelConfig(BaseModel, extra="forbid"):
    """Which episodes become good or bad examples of their own, without a pair."""

    per_task: int = 4
    """At most so many good and so many bad episodes of one task, the newest first."""
    min_rows: int = 12
    """Good rows, and as many bad ones: with fewer of either there is no KTO."""
    max_rows: int = 2000


class RoundsConfig(BaseModel, extra="forbid"):
    """How a method that learns from its own rollouts plays: each round with the policy of the round before."""

    method: ClassVar[str] = ""
    """The method that plays them."""
    rounds: int = Field(default=2, ge=1)
    num_tasks: int = Field(default=32, ge=1)
    """The first so many of the practice tasks."""
    num_tries: int = Field(default=4, ge=1)
    """Rollouts of each task in a round."""
    min_rows: int = 4
    max_rows: int = 4000


class GroupConfig(RoundsConfig):
    """The groups of GRPO. `min_rows`: tasks whose rollouts differ in reward; with fewer the rounds end."""

    method = "grpo"
    num_tries: int = Field(default=8, ge=2)
    token_price: float = Field(default=0.0, ge=0)
    """Share of its lead over the next lower reward of its task that a rollout loses for every 1,000 tokens that it
    wrote, at most a half in all; 0 makes tokens free. With it, groups whose rollouts all won teach the shorter ones."""


class RolloutConfig(RoundsConfig):
    """The rollouts that distillation scores; as many are played with memory. `min_rows`: rollouts without memory; with
    fewer the rounds end."""

    method = "distill"


class BranchConfig(RoundsConfig):
    """The branches of search: continuations from a step of an own episode. `num_tries`: the own episodes of each task
    that are branched from. `min_rows`: preferences; with fewer the rounds end."""

    method = "search"
    rounds: int = Field(default=1, ge=1)
    num_tries: int = Field(default=2, ge=1)
    num_points: int = Field(default=24, ge=1)
    """Steps at which a round branches, at the most."""
    num_ways: int = Field(default=4, ge=2)
    """Continuations that are sampled at a step."""
    num_rollouts: int = Field(default=2, ge=1)
    """Episodes that value a continuation, at the most: its own, and more that repeat its reply where the continuations
    ended differently. With one, luck in later steps is taken for the worth of a reply."""
    margin: float = Field(default=0.6, gt=0, le=1)
    """Least difference between the mean rewards of two continuations for a preference. Above one half, because two
    rollouts of each differ by that when a single one of the four had luck."""
    min_rows: int = 12


class TeachingConfig(BaseModel, extra="forbid"):
    """How much of the rows one teacher may give, so that a flood of feedback doesn't steer everybody's weights."""

    max_rows_per_user: int = Field(default=200, ge=1)
    """Of one named person; feedback that names nobody counts for its key alone."""
    max_rows_per_key: int = Field(default=1000, ge=1)
    max_rows_per_tenant: int = Field(default=1000, ge=1)
    """Of a tenant other than the default one, which is the operator's own."""
    corrections_per_task: int = Field(default=4, ge=1)
    """The newest of one task. More are taken only where `demonstrations.min_rows` would not be reached without them."""
    max_share: float = Field(default=0.5, ge=0.5, le=1)
    """Largest share of the rows for one user, one key, or one tenant other than the default one, where others teach
    too; 1 lifts it. Not below one half: two who teach alike would cut each other down to nothing."""


class EvaluationConfig(BaseModel, extra="forbid"):
    """The tasks that are played to decide, and the bars of a promotion. docs/gate.md explains the rule."""

    num_tasks: int = 200
    """Episodes of a cell. Played greedily each is a task of its own."""
    num_tries: int = Field(default=4, ge=1)
    """Tries of each task by the two contestants, where replies are sampled. They then play half as many tasks, and
    every other cell one try of those, so that the gate costs as many episodes as greedy play."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """None: the temperature that users are served with."""
    num_sealed_tasks: int = Field(default=100, ge=0)
    """Tasks of the sealed block, which a promoted policy plays once for the release report; 0 plays none."""
    min_tasks: int = 30
    """With fewer paired tasks the verdict is uninformative."""
    false_promotion_rate: float = Field(default=0.05, gt=0, lt=0.5)
    """How likely an active policy is ever replaced by one that is no better, all comparisons with it together."""
    margin: float = 0.0
    """Promote only if the lower end of the interval of the paired difference is above this."""
    noninferiority_margin: float | None = Field(default=None, gt=0, lt=1)
    """A candidate that loses less than this share of tasks, and serves with fewer tokens when it goes without memory,
    is promoted to serve that way. None: only a better candidate is promoted. Half of the error budget goes here."""
    serve_with_memory: bool = True
    """Whether users are served with memory where their request does not say; the verdict compares candidate and
    incumbent as they would serve."""
    allow_dearer: bool = True
    """Promote a better candidate that takes more turns or tokens than the limits below, and say so; else reject it."""
    max_regression: float = Field(default=0.1, gt=0, lt=1)
    """A candidate may lose less than this share of tasks in each environment of `learn_from`."""
    floor: float = 0.02
    """Both cells at or below this success rate, or at or above its complement: the tasks cannot tell them apart."""
    max_broken_share: float = 0.05
    """More FAILED, cancelled or timed-out episodes than this in either cell: uninformative."""
    max_truncated_share: float = 0.25
    """More than this cut by a budget in both cells: the budget was measured, not the policies."""
    max_extra_invalid_rate: float = 0.02
    """Invalid tool calls per model call that a candidate may add."""
    max_turns_ratio: float = 1.25
    """Model calls on tasks that both won, candidate against incumbent."""
    max_tokens_ratio: float = 1.5
    """Output tokens, and prompt tokens, per model call, candidate against incumbent."""

    # cycle/release_gate.py computes a block's start back from its end by this number: the start moves if the
    # temperature that users get is changed while a cycle is open and `temperature` is None
    def count_tasks(self, serving_temperature: float) -> int:
        """Return how many tasks the gate plays: half as many where the contestants try each several times."""
        temperature = serving_temperature if self.temperature is None else self.temperature
        return max(self.num_tasks // 2, 1) if temperature > 0 and self.num_tries > 1 else self.num_tasks


class OptimizerConfig(BaseModel, extra="forbid"):
    """The settings of one learning cycle."""

    environment: NameOrEmpty = "textworld"
    """The environment of practice, of the gate, and of the episodes that are learned from. Empty: only clients play;
    then both counts of episodes are 0, live traffic is learned from, and a candidate waits until clients have played
    held-out tasks as it and as the incumbent. A server for which none is named takes the environment that its model is
    made for (`textworld` for the pocket model), else the only one that was added, else live traffic."""
    learn_from: list[NameOrEmpty] = []
    """Other environments whose logged episodes are learned from too. The gate plays held-out tasks of each as well."""
    name: Name = "ratchet"
    """Adapters are called `<name>-v<version>`."""
    methods: list[str] = []
    """The methods of learning, in their order, each from the adapter of the one before: `["sft", "dpo"]`,
    `["sft", "kto"]`, `["kto"]`. Empty: those that the data allows; the report says which and why."""
    control: bool = False
    """Whether a cycle with several methods also trains SFT on all of its episodes, exploration included, and plays it
    beside the candidate: what the other methods win more than it is not due to more episodes. It is no candidate."""
    seed: int = 0
    num_practice_tasks: int = 64
    practice_episodes: int = 256
    """Played in rounds, one try of every task each, with insights extracted in between. 0: learn from logged ones."""
    practice_memory: list[bool] = [True]
    """Memory on or off per practice round; the last entry counts for all later rounds."""
    explore_episodes: int = 256
    """Episodes of the SFT policy, memory off, that preferences are found in."""
    num_selection_tasks: int = Field(default=64, ge=0)
    """Practice tasks, not trained on, that choose the candidate among the SFT policy and the DPO policy after each
    epoch. 0: the last one is."""
    practice_temperature: float = 1.0
    concurrency: int = Field(default=32, ge=1)
    max_pool: int = 5000
    """The newest so many rewarded trajectories are learned from."""
    demonstrations: DemonstrationConfig = DemonstrationConfig()
    preferences: PreferenceConfig = PreferenceConfig()
    labels: LabelConfig = LabelConfig()
    groups: GroupConfig = GroupConfig()
    rollouts: RolloutConfig = RolloutConfig()
    branches: BranchConfig = BranchConfig()
    teaching: TeachingConfig = TeachingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    recipe: dict[str, Any] = {}
    """Single entries of the recipe to replace, for example `{"sft_epochs": 3}`."""
    max_length_tokens: int | None = Field(default=None, ge=1)
    """Longer rows are left out and counted, never cut. None: as long as the engine's context, or as fits on the GPU."""
    # coerced: `gpu = 0` in a TOML file is a number
    gpu: str = Field(default="share", pattern=r"^(share|window|\d+)$", coerce_numbers_to_str=True)
    """The GPU that trains. "share": on the engine's GPU, beside it; refused if it cannot fit. "window": on the
    engine's GPU, while the engine is stopped and requests get 503. A number: on that GPU, as nvidia-smi counts them.
    Without a GPU only "window" means anything: the engine's cores are free for training then."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU; on a CPU float32, multiplied in bfloat16 where the processor can."""
    num_threads: int = 2
    """Threads of the trainer on a CPU."""
    training_attempts: int = Field(default=2, ge=1)
    """How often a trainer is started at the most; one that died goes on from its last checkpoint."""

    @model_validator(mode="after")
    def _fits_together(self) -> OptimizerConfig:
        if not self.environment and (self.practice_episodes or self.explore_episodes):
            raise ValueError(
                "nothing can be played without an environment: name one, or set practice_episodes and explore_episodes "
                "to 0"
            )
        # "" stands for live traffic; "live" is the name of its split, easily taken for an environment
        if set(self.learn_from) & {"", "live", self.environment}:
            raise ValueError(
                f"learn_from={self.learn_from!r} must name other environments than {self.environment!r}: live traffic "
                "is proved on live tasks, by a cycle of its own (`learn --logged`)"
            )
        if not self.environment and (playing := sorted(filter(self.find_rounds, self.methods))):
            raise ValueError(
                f"methods names {playing!r}, which learns from its own rollouts: name an environment, or choose "
                f"among {sorted(name for name in METHOD_NAMES if self.find_rounds(name) is None)!r}"
            )
        choose_recipe(0, self.recipe)  # a wrong name must fail here, not after an hour of practice
        return self

    @field_validator("methods")
    @classmethod
    def _is_a_sequence(cls, methods: list[str]) -> list[str]:
        unknown = [name for name in methods if name not in METHOD_NAMES]
        if unknown:
            raise ValueError(f"methods names {unknown!r}; there is {', '.join(METHOD_NAMES)}")
        repeated = sorted({name for name in methods if methods.count(name) > 1})
        if repeated:
            raise ValueError(f"methods names {repeated!r} more than once; each trains once in a cycle")
        if FIRST_METHOD in methods[1:]:
            raise ValueError(
                f"methods={methods!r}: {FIRST_METHOD!r} continues no other method, so what came before it would be "
                f"lost; put it first: {[FIRST_METHOD, *(it for it in methods if it != FIRST_METHOD)]!r}"
            )
        return methods

    @property
    def trains_control(self) -> bool:
        # without an environment nothing is played, so nothing could be compared with it
        return self.control and bool(self.environment)

    @property
    def practice_rounds(self) -> list[int]:
        """Number of tasks that each round of practice plays."""
        return plan_rounds(self.practice_episodes, self.num_practice_tasks)

    @property
    def explore_rounds(self) -> list[int]:
        """Number of tasks that each round of exploration plays."""
        return plan_rounds(self.explore_episodes, self.num_practice_tasks)

    @property
    def pool_environments(self) -> tuple[str, ...]:
        """The environments whose episodes are learned from; `""` stands for live traffic."""
        return (self.environment, *self.learn_from)

    def find_rounds(self, method: str) -> RoundsConfig | None:
        """Return how the rounds of a method play, which need an environment; None for one that trains once."""
        sections = (section for _, section in self if isinstance(section, RoundsConfig))
        return next((section for section in sections if section.method == method), None)

    def plan_training(self, recipe: Recipe, method: str, num_rows: int, *, min_steps: int) -> dict[str, Any]:
        """Return what recipe and configuration decide of the spec of a training on `num_rows`."""
        wanted = recipe.methods[method]
        batch_size, epochs = plan_steps(
            num_rows, batch_size=wanted.batch_size, epochs=wanted.epochs, min_steps=min_steps
        )
        return {
            "learning_rate": wanted.learning_rate,
            "batch_size": batch_size,
            "epochs": epochs,
            "lora_rank": recipe.lora_rank,
            "lora_alpha": recipe.lora_alpha,
            "gradient_checkpointing": recipe.gradient_checkpointing,
            "seed": self.seed,
            "device": self.device,
            "dtype": self.dtype,
            "num_threads": self.num_threads,
        }
