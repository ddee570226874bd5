from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from memory.records.trajectories import ModelCalls
from memory.schema import Split, Task, Trajectory, TrajectoryStage, new_id
from optimizer.config import EvaluationConfig
from optimizer.evaluation.cells import Cell, CellResult, HeldOutEpisode, describe, play_cell
from optimizer.evaluation.decision import Basis, Decision, alpha_of, decide
from tests.optimizer.played import EPISODE

CONFIG = EvaluationConfig(min_tasks=30)


def cell(successes, name="candidate", **changes) -> CellResult:
    played = [replace(EPISODE, task=str(n), is_success=won, **changes) for n, won in enumerate(successes)]
    return CellResult(Cell(name, 1 if name == "candidate" else 0, True), played)


def wins(num_won: int, num_tasks: int = 200) -> list[bool]:
    return [n < num_won for n in range(num_tasks)]


INCUMBENT = cell(wins(40), "incumbent")


def test_a_better_candidate_is_promoted_with_its_numbers():
    verdict = decide(cell(wins(70)), INCUMBENT, CONFIG)

    assert verdict.decision is Decision.PROMOTE
    assert verdict.paired.low > 0 and len(verdict.tasks_won) == 30 and not verdict.tasks_lost
    assert verdict.to_json()["decision"] == "promote"


def test_a_worse_candidate_is_rejected():
    verdict = decide(cell(wins(15)), INCUMBENT, CONFIG)

    assert verdict.decision is Decision.REJECT and verdict.reason.startswith("worse")


def test_a_candidate_that_is_neither_shown_to_be_better_nor_worse_is_not_decided_on():
    for num_won in (42, 40, 39):
        assert decide(cell(wins(num_won)), INCUMBENT, CONFIG).decision is Decision.UNINFORMATIVE


def test_four_wins_and_no_loss_among_forty_tasks_are_no_reason_to_reject():
    verdict = decide(cell(wins(14, 40)), cell(wins(10, 40), "incumbent"), CONFIG)

    assert (verdict.paired.num_won, verdict.paired.num_lost) == (4, 0)
    assert verdict.decision is Decision.UNINFORMATIVE and verdict.was_tested


def test_a_margin_must_be_cleared_by_the_whole_interval_and_missed_by_the_whole_interval():
    better, with_margin = cell(wins(60)), CONFIG.model_copy(update={"margin": 0.08})

    assert decide(better, INCUMBENT, CONFIG).decision is Decision.PROMOTE
    assert decide(better, INCUMBENT, with_margin).decision is Decision.UNINFORMATIVE
    assert decide(cell(wins(41)), INCUMBENT, with_margin).decision is Decision.REJECT


def test_a_later_look_at_the_same_incumbent_needs_stronger_evidence():
    better = cell(wins(46))  # six won, none lost: p = 0.016

    assert decide(better, INCUMBENT, CONFIG, look=1).decision is Decision.PROMOTE
    assert decide(better, INCUMBENT, CONFIG, look=2).decision is Decision.UNINFORMATIVE
    assert sum(alpha_of(look, 0.05) for look in range(1, 100_000)) <= 0.05


def test_a_floor_and_a_ceiling_say_nothing():
    for both in (wins(0), wins(2), wins(200), wins(199)):
        verdict = decide(cell(both), cell(both, "incumbent"), CONFIG)
        assert verdict.decision is Decision.UNINFORMATIVE


def test_too_few_tasks_say_nothing():
    assert decide(cell(wins(20, 20)), cell(wins(2, 20), "incumbent"), CONFIG).decision is Decision.UNINFORMATIVE


def test_a_storm_of_failures_says_nothing_even_if_the_rest_looks_better():
    stormy = cell(wins(120))
    stormy = CellResult(stormy.cell, [replace(e, is_broken=n % 10 == 0) for n, e in enumerate(stormy.played)])

    verdict = decide(stormy, INCUMBENT, CONFIG)

    assert verdict.decision is Decision.UNINFORMATIVE and "broke off" in verdict.reason


def test_a_budget_that_cuts_both_was_measured_itself():
    cut = cell(wins(70), is_truncated=True), cell(wins(40), "incumbent", is_truncated=True)

    assert decide(*cut, CONFIG).decision is Decision.UNINFORMATIVE


def test_a_candidate_that_runs_into_the_budget_alone_is_judged_by_what_it_won():
    assert decide(cell(wins(10), is_truncated=True), INCUMBENT, CONFIG).decision is Decision.REJECT


DEARER = ({"output_tokens": 400}, {"prompt_tokens": 9000}, {"num_calls": 12})


def test_invalid_tool_calls_are_not_bought_with_success():
    verdict = decide(cell(wins(80), num_invalid_tool_calls=1), INCUMBENT, CONFIG)

    assert verdict.decision is Decision.REJECT and "guard" in verdict.reason


def test_a_candidate_that_wins_because_it_learned_to_call_tools_is_promoted_and_its_invalid_calls_are_named():
    talks = cell(wins(40), "incumbent", num_calling_tools=0)
    verdict = decide(cell(wins(80), num_invalid_tool_calls=1), talks, CONFIG)

    assert verdict.decision is Decision.PROMOTE and verdict.is_dearer
    assert (
        "it is dearer: invalid tool calls per model call" in verdict.reason and "(difference at least" in verdict.reason
    )


def test_of_an_incumbent_of_an_older_file_it_is_unknown_whether_it_calls_tools():
    older = cell(wins(40), "incumbent", num_calling_tools=None)
    assert decide(cell(wins(80), num_invalid_tool_calls=1), older, CONFIG).decision is Decision.REJECT


@pytest.mark.parametrize("how", DEARER)
def test_a_better_candidate_that_costs_more_is_promoted_and_its_price_is_named(how):
    verdict = decide(cell(wins(80), **how), INCUMBENT, CONFIG)

    assert verdict.decision is Decision.PROMOTE and verdict.is_dearer
    assert "it is dearer" in verdict.reason


@pytest.mark.parametrize("how", DEARER)
def test_where_the_operator_says_so_a_dearer_candidate_is_rejected(how):
    verdict = decide(cell(wins(80), **how), INCUMBENT, CONFIG.model_copy(update={"allow_dearer": False}))

    assert verdict.decision is Decision.REJECT and "guard" in verdict.reason


def test_a_guard_does_not_object_to_what_may_be_noise():
    # many invalid calls on three tasks of 200: 0.026 a turn, over the limit of 0.02, but the interval reaches 0
    better = cell(wins(80))
    unlucky = [replace(e, num_invalid_tool_calls=14 * (n < 3)) for n, e in enumerate(better.played)]

    verdict = decide(CellResult(better.cell, unlucky), INCUMBENT, CONFIG)

    (guard,) = [guard for guard in verdict.guards if guard.is_hard]
    assert guard.candidate > guard.limit > guard.low and verdict.decision is Decision.PROMOTE


def test_a_broken_try_is_lost_by_whoever_broke():
    broken = {5, 6, 7, 8}  # tasks that the incumbent won

    def breaking(result: CellResult, numbers: set[int]) -> CellResult:
        changed = [
            replace(e, is_broken=True, is_success=False) if n in numbers else e for n, e in enumerate(result.played)
        ]
        return CellResult(result.cell, changed)

    alike = cell(wins(40))
    assert decide(breaking(alike, broken), INCUMBENT, CONFIG).paired.num_lost == 4
    assert decide(alike, breaking(INCUMBENT, broken), CONFIG).paired.num_won == 4
    both = decide(breaking(alike, broken), breaking(INCUMBENT, broken), CONFIG)
    assert (both.paired.num_lost, both.paired.num_won, both.paired.num_tasks) == (0, 0, 196)


def test_without_a_margin_no_worse_and_cheaper_is_not_enough():
    lean = cell(wins(40), prompt_tokens=1000)

    assert decide(cell(wins(40)), INCUMBENT, CONFIG, without_memory=lean).decision is Decision.UNINFORMATIVE


def test_a_candidate_that_is_no_worse_and_cheaper_is_promoted_to_serve_that_way():
    with_margin = CONFIG.model_copy(update={"noninferiority_margin": 0.05})
    lean = cell(wins(39), prompt_tokens=1000)
    lean = CellResult(replace(lean.cell, name="dpo-off", use_memory=False), lean.played)

    verdict = decide(cell(wins(40)), INCUMBENT, with_margin, without_memory=lean)

    assert (verdict.decision, verdict.basis) == (Decision.PROMOTE, Basis.NO_WORSE)
    assert verdict.candidate == lean.cell and verdict.no_worse.tokens_saved == 1000

    worse = cell(wins(20), prompt_tokens=1000)
    as_dear = cell(wins(39))
    for other in (worse, as_dear):
        assert decide(cell(wins(40)), INCUMBENT, with_margin, without_memory=other).decision is Decision.UNINFORMATIVE


def test_tries_of_one_task_are_one_piece_of_evidence():
    def repeat(result: CellResult, times: int) -> CellResult:
        return CellResult(result.cell, [episode for episode in result.played for _ in range(times)])

    once, four_times = (
        decide(repeat(cell(wins(44)), times), repeat(INCUMBENT, times), CONFIG).paired for times in (1, 4)
    )

    assert once == four_times
    assert repeat(INCUMBENT, 4).summary().pass_at_tries == 0.2 and INCUMBENT.summary().pass_at_tries is None


def test_pass_at_four_counts_tasks_that_any_of_four_tries_solved():
    result = CellResult(INCUMBENT.cell, [e for n in range(4) for e in cell([task == n for task in range(8)]).played])

    summary = result.summary()

    assert (summary.success, summary.pass_at_tries, summary.num_tries) == (0.125, 0.5, 4)


def test_more_turns_because_more_is_survived_is_no_fault():
    better = cell(wins(80))
    longer = [replace(e, num_calls=8 if n < 40 else 16, prompt_tokens=4000) for n, e in enumerate(better.played)]

    assert decide(CellResult(better.cell, longer), INCUMBENT, CONFIG).decision is Decision.PROMOTE


CALLS = ModelCalls(num=5, num_calling_tools=4)


def describe_calls(trajectory: Trajectory, reward: float | None) -> HeldOutEpisode:
    return describe("1", trajectory, reward, 1.0, CALLS)


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
    late = describe_calls(trajectory(error="BudgetExceeded: 300 seconds are over"), 0.0)
    failed = describe_calls(trajectory(stage=TrajectoryStage.FAILED, error="PolicyError: gone"), None)
    cut = describe_calls(trajectory(error="BudgetExceeded: 24 steps are used up"), 0.0)

    assert late.is_broken and failed.is_broken and not cut.is_broken
    assert cut.is_truncated and not late.is_truncated
    assert cut.num_calls == 5


async def test_a_cell_plays_every_task_as_often_and_as_warm_as_it_is_told_with_another_seed_each_time():
    asked = []

    async def rollout(task, *, policy, use_memory, temperature, seed):
        asked.append((task.name, temperature, seed))
        return trajectory(id=f"{task.name}-{seed}", policy=policy)

    result = await play_cell(
        Cell("dpo-on", 3, True),
        [Task("kitchen", name, "cooking", Split.HELD_OUT) for name in ("a", "b")],
        rollout=rollout,
        grade=lambda trajectory_id: 1.0,
        count_model_calls=lambda trajectory_id: replace(CALLS, num=7),
        success_reward=1.0,
        concurrency=4,
        temperature=0.7,
        num_tries=4,
    )

    assert len(set(asked)) == 8 and {temperature for _, temperature, _ in asked} == {0.7}
    assert result.num_tries == 4 and {episode.num_calls for episode in result.played} == {7}


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
        count_model_calls=lambda trajectory_id: CALLS,
        success_reward=1.0,
        concurrency=4,
        on_progress=on_progress,
    )

    assert [episode.task for episode in result.played] == [task.name for task in tasks]
    assert most_playing == 4 and told[-1] == (12, 12)
    assert result.success == 0.5
