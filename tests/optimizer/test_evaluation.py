from __future__ import annotations

import asyncio
from dataclasses import replace

from memory.schema import Split, Task, Trajectory, TrajectoryStage, new_id
from optimizer.config import EvaluationConfig
from optimizer.evaluation import Cell, CellResult, Decision, Played, describe, judge, play_cell

CONFIG = EvaluationConfig(min_tasks=30)


def cell(successes, name="candidate", **changes) -> CellResult:
    episode = Played(
        task="",
        trajectory_id="",
        is_success=False,
        is_broken=False,
        is_truncated=False,
        num_turns=8,
        prompt_tokens=2000,
        output_tokens=100,
        num_invalid_tool_calls=0,
    )
    played = [replace(episode, task=str(n), is_success=won, **changes) for n, won in enumerate(successes)]
    return CellResult(Cell(name, 1 if name == "candidate" else 0, True), played)


def wins(num_won: int, num_tasks: int = 200) -> list[bool]:
    return [n < num_won for n in range(num_tasks)]


INCUMBENT = cell(wins(40), "incumbent")


def test_a_better_candidate_is_promoted_with_its_numbers():
    verdict = judge(cell(wins(70)), INCUMBENT, CONFIG)

    assert verdict.decision is Decision.PROMOTE
    assert verdict.paired.low > 0 and len(verdict.tasks_won) == 30 and not verdict.tasks_lost
    assert verdict.to_json()["decision"] == "promote"


def test_a_worse_candidate_is_rejected():
    verdict = judge(cell(wins(15)), INCUMBENT, CONFIG)

    assert verdict.decision is Decision.REJECT and verdict.reason.startswith("worse")


def test_a_candidate_that_is_not_shown_to_be_better_is_rejected():
    assert judge(cell(wins(42)), INCUMBENT, CONFIG).decision is Decision.REJECT
    assert judge(cell(wins(40)), INCUMBENT, CONFIG).decision is Decision.REJECT


def test_a_margin_must_be_cleared_by_the_whole_interval():
    better = cell(wins(60))

    assert judge(better, INCUMBENT, CONFIG).decision is Decision.PROMOTE
    assert judge(better, INCUMBENT, CONFIG.model_copy(update={"margin": 0.08})).decision is Decision.REJECT


def test_a_floor_and_a_ceiling_say_nothing():
    for both in (wins(0), wins(2), wins(200), wins(199)):
        verdict = judge(cell(both), cell(both, "incumbent"), CONFIG)
        assert verdict.decision is Decision.UNINFORMATIVE


def test_too_few_tasks_say_nothing():
    assert judge(cell(wins(20, 20)), cell(wins(2, 20), "incumbent"), CONFIG).decision is Decision.UNINFORMATIVE


def test_a_storm_of_failures_says_nothing_even_if_the_rest_looks_better():
    stormy = cell(wins(120))
    stormy = CellResult(stormy.cell, [replace(e, is_broken=n % 10 == 0) for n, e in enumerate(stormy.played)])

    verdict = judge(stormy, INCUMBENT, CONFIG)

    assert verdict.decision is Decision.UNINFORMATIVE and "broke off" in verdict.reason


def test_a_budget_that_cuts_both_was_measured_itself():
    cut = cell(wins(70), is_truncated=True), cell(wins(40), "incumbent", is_truncated=True)

    assert judge(*cut, CONFIG).decision is Decision.UNINFORMATIVE


def test_a_candidate_that_runs_into_the_budget_alone_is_judged_by_what_it_won():
    assert judge(cell(wins(10), is_truncated=True), INCUMBENT, CONFIG).decision is Decision.REJECT


def test_broken_tool_calls_and_verbosity_are_not_bought_with_success():
    for hack in ({"num_invalid_tool_calls": 1}, {"output_tokens": 400}, {"prompt_tokens": 9000}, {"num_turns": 12}):
        verdict = judge(cell(wins(80), **hack), INCUMBENT, CONFIG)
        assert verdict.decision is Decision.REJECT and "guard" in verdict.reason


def test_more_turns_because_more_is_survived_is_no_fault():
    better = cell(wins(80))
    longer = [replace(e, num_turns=8 if n < 40 else 16, prompt_tokens=4000) for n, e in enumerate(better.played)]

    assert judge(CellResult(better.cell, longer), INCUMBENT, CONFIG).decision is Decision.PROMOTE


def trajectory(**fields) -> Trajectory:
    return Trajectory(
        **{
            "id": new_id("trj"),
            "episode_id": "e",
            "policy": 1,
            "stage": TrajectoryStage.FINISHED,
            "num_steps": 9,
            **fields,
        }
    )


def test_an_episode_that_ran_out_of_time_or_failed_says_nothing_of_the_policy():
    late = describe("1", trajectory(error="BudgetExceeded: 300 seconds are over"), 0.0, 1.0)
    failed = describe("1", trajectory(stage=TrajectoryStage.FAILED, error="PolicyError: gone"), None, 1.0)
    cut = describe("1", trajectory(error="BudgetExceeded: 24 steps are used up"), 0.0, 1.0)

    assert late.is_broken and failed.is_broken and not cut.is_broken
    assert cut.is_truncated and not late.is_truncated
    assert cut.num_turns == 5


async def test_a_cell_plays_every_task_once_greedily_within_its_concurrency():
    tasks = [Task("kitchen", str(n), "cooking", Split.HELD_OUT) for n in range(12)]
    now_playing, most_playing, told = 0, 0, []

    async def rollout(task, *, policy, use_memory, temperature, seed):
        nonlocal now_playing, most_playing
        assert (policy, use_memory, temperature) == (3, False, 0.0)
        now_playing += 1
        most_playing = max(most_playing, now_playing)
        await asyncio.sleep(0)
        now_playing -= 1
        return trajectory(id=task.name, policy=policy)

    async def on_progress(done, total, message):
        told.append((done, total))

    result = await play_cell(
        Cell("dpo-off", 3, False),
        tasks,
        rollout=rollout,
        grade=lambda trajectory_id: float(int(trajectory_id) % 2),
        success_reward=1.0,
        concurrency=4,
        on_progress=on_progress,
    )

    assert [episode.task for episode in result.played] == [task.name for task in tasks]
    assert most_playing == 4 and told[-1] == (12, 12)
    assert result.success == 0.5
