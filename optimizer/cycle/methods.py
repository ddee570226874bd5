"""The methods of learning that a cycle applies, in their order.

To add one, write a module in `optimizer.data` that builds its rows, a trainer in `optimizer.training` under the
method's name, and an entry in `METHODS`; stages, reports and evaluation follow from the entry.
"""

from __future__ import annotations

from optimizer.cycle.needs import need_demonstrations, need_preferences
from optimizer.cycle.stages import (
    Hyperparameters,
    Method,
    MethodStage,
    build_rows,
    build_rows_and_train,
    explore,
    train,
)
from optimizer.data import demonstrations, preferences
from optimizer.training.footprint import PAIRWISE

# Order: a method stands behind the one that it starts from. Names are stored in artefacts and manifests, and cells are
# called `<name>-on`, so a name has no hyphen.
METHODS: tuple[Method, ...] = (
    Method(
        name="sft",
        title="SFT",
        rows="demonstrations",
        build=demonstrations.build,
        min_rows=lambda config: config.demonstrations.min_rows,
        hyperparameters=lambda recipe: Hyperparameters(
            learning_rate=recipe.sft_learning_rate, epochs=recipe.sft_epochs, batch_size=recipe.sft_batch_size
        ),
        measure_need=need_demonstrations,
        describe=demonstrations.describe,
        note="SFT on its own successes",
        stages=(MethodStage("demonstrate", build_rows), MethodStage("sft", train)),
    ),
    Method(
        name="dpo",
        title="DPO",
        rows="preferences",
        build=preferences.build,
        min_rows=lambda config: config.preferences.min_rows,
        hyperparameters=lambda recipe: Hyperparameters(
            learning_rate=recipe.dpo_learning_rate,
            epochs=recipe.dpo_epochs,
            batch_size=recipe.dpo_batch_size,
            beta=recipe.dpo_beta,
            sft_weight=recipe.dpo_sft_weight,
        ),
        measure_need=need_preferences,
        describe=preferences.describe,
        note="DPO from the SFT adapter",
        stages=(
            MethodStage("explore", explore, is_needed=lambda config: bool(config.explore_episodes)),
            MethodStage("dpo", build_rows_and_train),
        ),
        starts_from="sft",
        loss=PAIRWISE,
        # without exploration, only the mistakes of logged policies can be compared
        reads_new_episodes_only=lambda config: config.explore_episodes > 0,
        chooses_epoch=True,
    ),
)
