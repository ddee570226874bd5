"""Trains in rounds within one cycle: the policy plays, is trained on what it played, and the next round plays with it.

Flow: play -> rows -> train -> choose -> play with the chosen policy -> ...
Invariants: a finished round is not played or trained again when the stage is repeated; each round has an adapter of its
own, which a round that made it worse does not pass on.
"""

from __future__ import annotations

from optimizer.cycle import practice
from optimizer.cycle.context import CycleContext
from optimizer.cycle.stages import Method, build_rows, find_start, train


async def train_in_rounds(context: CycleContext, method: Method) -> None:
    """Run the configured rounds of a method; fewer where a round brings too few rows.

    Raises:
        TooFewTrajectories: it is the first method of the cycle, and its first round brought too few rows.
    """
    config = context.config.find_rounds(method.name)
    assert config is not None, f"the method {method.name!r} has no rounds"
    for number in range(context.artifacts.num_rounds.get(method.name, 0), config.rounds):
        start = await find_start(context, method)
        label = f"{method.title} round {number + 1} of {config.rounds}"
        if context.artifacts.num_rounds_played.get(method.name, 0) <= number:
            await practice.play_round(context, start, config, with_memory=method.plays_with_memory, label=label)
            played = {**context.artifacts.num_rounds_played, method.name: number + 1}
            await context.save_artifacts(num_rounds_played=played)
        if method.play_on is not None:
            await method.play_on(context, method, start, label)
        await build_rows(context, method)
        trained = await train(context, method)
        if trained is None:
            return
        selection = context.artifacts.selection
        chosen = trained.policy if selection is None or selection.chosen is None else selection.chosen
        artifacts = context.artifacts
        # one write: a round that counts as finished is the one that the next starts from
        await context.save_artifacts(
            starts={**artifacts.starts, method.name: chosen},
            num_rounds={**artifacts.num_rounds, method.name: number + 1},
        )
