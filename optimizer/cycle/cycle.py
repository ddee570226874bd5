"""One turn of the loop: collect, demonstrate, SFT, explore, DPO, evaluate, settle.

A LangGraph graph whose nodes are the stages. LangGraph keeps the place (`checkpoints.db`), the Cycle row keeps what was
made and shows how far it is; a process that dies goes on at the stage where it died.

Refuses to know what stages do and who asked for the cycle. Invariant: a cycle ends COMPLETED with a verdict, or ERROR
with a reason; one that is cancelled or killed stays open, and `run_cycle` takes it up again.
"""

from __future__ import annotations

import asyncio
import operator
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict

import aiosqlite
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph

from memory.schema import Cycle, CycleStage
from optimizer.config import OptimizerConfig
from optimizer.cycle import release_gate, stages
from optimizer.cycle.context import CycleContext
from optimizer.cycle.readiness import measure_needs, measure_surroundings, require_needs
from optimizer.seams import Seams

BUSY_TIMEOUT_MS = 30_000

STAGES: tuple[tuple[CycleStage, Callable[[CycleContext], Awaitable[None]]], ...] = (
    (CycleStage.COLLECT, stages.collect),
    (CycleStage.DEMONSTRATE, stages.demonstrate),
    (CycleStage.SFT, stages.train_sft),
    (CycleStage.EXPLORE, stages.explore),
    (CycleStage.DPO, stages.train_dpo),
    (CycleStage.EVALUATE, release_gate.evaluate),
    (CycleStage.SETTLE, release_gate.settle),
)


class Place(TypedDict):
    """All that the checkpoint holds: which stages are behind us."""

    done: Annotated[list[str], operator.add]


async def open_cycle(memory: Any, config: OptimizerConfig, *, seams: Seams | None = None) -> Cycle:
    """Open a cycle with these settings, its artifacts saying whose episodes it learns from and what it needs; with
    `seams`, only if its trainings fit on the machine.

    Raises:
        CycleInProgress: one is open.
        TrainingDoesNotFit: no GPU has the memory for it.
        TooFewTrajectories: what is logged and what practice can add are not enough to train on.
    """
    needs = await measure_needs(memory, config)
    require_needs(needs)
    if seams is not None:
        needs += await measure_surroundings(memory, config, seams)
        require_needs(needs)
    note = describe_pool(await asyncio.to_thread(memory.trajectories.count_learnable), config)
    cycle = await memory.cycles.open(config.model_dump(mode="json"))
    return await memory.cycles.save(cycle.id, artifacts={"pool": note, "needs": [need.to_json() for need in needs]})


def describe_pool(counts: dict[str, int], config: OptimizerConfig) -> str:
    """Say whose episodes a cycle learns from and which it leaves out; `counts` are those of each environment."""
    ours = config.pool_environments
    note = f"weights learn from {' and '.join(_name_pool(environment) for environment in ours)} only"
    others = [
        f"{number} of {_name_pool(environment)}" for environment, number in counts.items() if environment not in ours
    ]
    if others:
        note += f"; rewarded episodes left out: {', '.join(sorted(others))}"
    if counts.get("") and "" not in ours:
        note += ". Live traffic, corrections included, is learned from by `learn --logged` and proved on live tasks"
    return note


def _name_pool(environment: str) -> str:
    return f"{environment!r}" if environment else "live traffic"


async def run_cycle(memory: Any, cycle_id: str, *, seams: Seams) -> dict[str, Any]:
    """Turn the loop once, or what is left of it; return the verdict.

    Raises:
        OptimizerError: a stage could not do its work; the cycle is closed with the reason.
    """
    context = CycleContext(memory, seams, cycle_id)
    async with open_checkpoints(memory.data_dir / "checkpoints.db") as checkpoints:
        graph = build_graph(context).compile(checkpointer=checkpoints)
        try:
            await go_on(graph, cycle_id)
        except Exception as error:  # recorded where people look, then raised on
            await memory.cycles.save(cycle_id, stage=CycleStage.ERROR, error=_explain(error))
            await checkpoints.adelete_thread(cycle_id)
            raise
        verdict = context.artifacts["verdict"]
        await memory.cycles.save(cycle_id, stage=CycleStage.COMPLETED, verdict=verdict)
        await checkpoints.adelete_thread(cycle_id)
    return verdict


async def abandon_cycle(memory: Any, cycle_id: str, reason: str) -> Cycle:
    """Close a cycle whose `run_cycle` was cancelled and shall not be taken up again."""
    closed = await memory.cycles.save(cycle_id, stage=CycleStage.ERROR, error=reason)
    async with open_checkpoints(memory.data_dir / "checkpoints.db") as checkpoints:
        await checkpoints.adelete_thread(cycle_id)
    return closed


def _explain(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):  # of episodes played at once, the first that broke says enough
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def build_graph(context: CycleContext) -> StateGraph:
    """Return the stages in a row."""
    graph = StateGraph(Place)
    previous = START
    for stage, work in STAGES:
        graph.add_node(stage.value, _as_node(context, stage, work))
        graph.add_edge(previous, stage.value)
        previous = stage.value
    graph.add_edge(previous, END)
    return graph


def _as_node(
    context: CycleContext, stage: CycleStage, work: Callable[[CycleContext], Awaitable[None]]
) -> Callable[[Place], Awaitable[dict[str, list[str]]]]:
    async def node(place: Place) -> dict[str, list[str]]:
        await context.enter(stage)
        await work(context)
        return {"done": [stage.value]}

    return node


async def go_on(graph: Any, cycle_id: str) -> None:
    """Run the graph from its last checkpoint, or from its beginning."""
    settings = {"configurable": {"thread_id": cycle_id}}
    place = await graph.aget_state(settings)
    # "sync": the next stage begins only when the place is on disk
    await graph.ainvoke(None if place.values else {"done": []}, settings, durability="sync")


@asynccontextmanager
async def open_checkpoints(path: Path) -> AsyncIterator[AsyncSqliteSaver]:
    async with aiosqlite.connect(path) as connection:
        await connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        checkpoints = AsyncSqliteSaver(connection)
        await checkpoints.setup()  # a cycle may be cancelled before its graph has written a first checkpoint
        yield checkpoints
