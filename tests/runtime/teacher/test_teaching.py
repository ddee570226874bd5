"""A teacher plays practice tasks within its budget, over real HTTP, with a scripted model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from memory.formats.registry import find_format
from memory.schema import Split, Task
from runtime.config import TeacherConfig
from runtime.errors import CriticFailed, EnvironmentRefused, ToolRefused
from runtime.serving.chat_endpoint import MAX_TRIES, ChatEndpoint, EndpointError, Usage, bound_prompt_tokens
from runtime.teacher.budget import BudgetSpent, TeacherBudget
from runtime.teacher.teaching import (
    MAX_NAMED_FAILURES,
    TaughtEpisode,
    TeachingCounts,
    TeachingLimits,
    play,
    teach,
)
from tests.runtime.fake_engine import FakeEngine, Reply, Script, call, say
from tests.runtime.levers import LeverGame, Levers

LIMITS = TeachingLimits(max_steps=6, max_seconds=20, max_output_tokens=50, success_reward=1.0)
KEY = "sk-secret-of-the-teacher"
TASKS = ("left-right", "left-left", "right-left")


def solve(request: dict) -> Reply:
    """Pull left, then right, which solves only `left-right`."""
    num_pulled = sum(message["role"] == "tool" for message in request["messages"])
    return call("pull", lever="left" if num_pulled == 0 else "right")


class BrokenLevers(Levers):
    """Levers with tasks that raise: `at_start` at their start, `at_close` when they are scored."""

    def __init__(self, at_start: dict[str, Exception] | None = None, at_close: Exception | None = None) -> None:
        super().__init__()
        self.at_start, self.at_close = at_start or {}, at_close

    async def start(self, task: Task) -> LeverGame:
        if task.name in self.at_start:
            raise self.at_start[task.name]
        game = await super().start(task)
        game.close_error = self.at_close
        return game


class Run:
    """One run of `teach` against a scripted endpoint."""

    def __init__(self, script: Script, *, max_tokens: int = 1_000_000, levers: Levers | None = None) -> None:
        self.script = script
        self.budget = TeacherBudget(max_tokens=max_tokens, max_cost=9, prompt_price=1.0, output_price=10.0)
        self.saved: list[TaughtEpisode] = []
        self.pauses: list[float] = []
        self.levers = levers or Levers()
        self.requests: list[dict] = []

    async def teach(
        self,
        tasks: Sequence[Task],
        *,
        api_key: str | None = KEY,
        concurrency: int = 1,
        limits: TeachingLimits = LIMITS,
    ) -> TeachingCounts:
        async with FakeEngine(self.script) as engine:
            engine.api_key = KEY
            self.requests = engine.requests
            config = TeacherConfig(url=f"{engine.url}/v1", model="base", api_key="TEACHER_KEY")
            teacher = ChatEndpoint("teacher", config, api_key=api_key, budget=self.budget, sleep=self._sleep)
            return await teach(
                self.levers,
                tasks,
                teacher,
                limits,
                save=self._save,
                concurrency=concurrency,
                on_taught=lambda counts: None,
            )

    def tasks(self) -> list[Task]:
        return [self.levers.task(name) for name in TASKS]

    async def _save(self, episode: TaughtEpisode) -> None:
        self.saved.append(episode)

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


async def test_only_what_the_environment_rewards_is_kept():
    run = Run(solve)
    counts = await run.teach(run.tasks(), concurrency=2)
    assert (counts.num_solved, counts.num_unsolved, counts.num_unplayed) == (1, 2, 0)
    (episode,) = run.saved
    assert (episode.task, episode.reward, episode.is_trusted) == ("left-right", 1.0, True)
    content = find_format("ratchet").read(json.loads(json.dumps(episode.to_row())))
    assert [message["role"] for message in content.prompt] == ["system", "user"]
    assert [message["role"] for message in content.completion] == ["assistant", "tool", "assistant", "tool"]
    assert content.task == "left-right" and content.tools[0]["function"]["name"] == "pull"
    assert all(game.num_closed == 1 for game in run.levers.started)


async def test_a_held_out_task_is_never_shown_to_a_teacher():
    run = Run(solve)
    held_out = replace(run.levers.task("left-right"), split=Split.HELD_OUT)
    with pytest.raises(ValueError, match="'left-right' of 'levers' is a held-out task"):
        await run.teach([run.levers.task("left-left"), held_out])
    assert run.requests == [] and run.levers.started == []
    config = TeacherConfig(url="http://127.0.0.1:9", model="base")
    teacher = ChatEndpoint("teacher", config, budget=TeacherBudget(max_tokens=1))
    with pytest.raises(ValueError, match="practice tasks only"):
        await play(run.levers, held_out, teacher, LIMITS)


async def test_no_call_is_sent_whose_worst_case_exceeds_the_budget():
    run = Run(solve, max_tokens=2_500)
    counts = await run.teach(run.tasks() * 10)
    spent = run.budget.to_json()
    assert counts.num_solved >= 1 and counts.num_unplayed > 0 and not counts.has_teacher_failed
    assert counts.stopped_by is not None and "raise teacher.max_tokens" in counts.stopped_by
    assert spent["tokens_spent"] <= 2_500 and spent["num_calls"] == len(run.requests)
    assert spent["tokens_spent"] + spent["tokens_left"] == 2_500
    too_little = Run(solve, max_tokens=LIMITS.max_output_tokens)
    await too_little.teach(too_little.tasks())
    assert too_little.requests == []


async def test_a_task_that_does_not_start_is_named_and_the_others_are_played():
    at_start = {"left-left": ToolRefused("the setup fails,\nwith status 3"), "right-left": OSError("full")}
    run = Run(solve, levers=BrokenLevers(at_start))
    counts = await run.teach(run.tasks())
    assert (counts.num_solved, counts.num_failed, counts.num_unplayed) == (1, 2, 0)
    assert counts.stopped_by is None and [episode.task for episode in run.saved] == ["left-right"]
    assert sorted(counts.failures) == [
        "'left-left': ToolRefused: the setup fails, with status 3",
        "'right-left': OSError: full",
    ]


async def test_a_task_whose_critic_fails_is_named_and_closed_once():
    run = Run(solve, levers=BrokenLevers(at_close=CriticFailed("the critic 'tone' gave no reward")))
    counts = await run.teach(run.tasks())
    assert (counts.num_solved, counts.num_failed, run.saved) == (0, 3, [])
    assert counts.failures[0] == "'left-right': CriticFailed: the critic 'tone' gave no reward"
    assert [game.num_closed for game in run.levers.started] == [1, 1, 1]


async def test_a_task_that_takes_too_long_is_named_with_the_limit():
    run = Run(solve)
    with_little_time = replace(LIMITS, max_seconds=0.0)
    counts = await run.teach(run.tasks()[:1], limits=with_little_time)
    assert (counts.num_failed, counts.failures) == (1, ["'left-right': TimeoutError: it did not end within 0 seconds"])


async def test_of_many_failures_the_first_are_named_and_all_are_counted():
    run = Run(solve, levers=BrokenLevers({"left-left": OSError("full")}))
    counts = await run.teach([run.levers.task("left-left")] * (MAX_NAMED_FAILURES + 5))
    assert (counts.num_failed, len(counts.failures)) == (MAX_NAMED_FAILURES + 5, MAX_NAMED_FAILURES)


async def test_an_environment_that_can_start_no_task_ends_the_run():
    refused = EnvironmentRefused("scienceworld needs Java, and no 'java' starts here")
    run = Run(solve, levers=BrokenLevers({"left-left": refused}))
    counts = await run.teach(run.tasks())
    assert (counts.num_solved, counts.num_failed, counts.num_unplayed) == (1, 0, 2)
    assert counts.stopped_by == str(refused) and counts.is_environment_refused and not counts.has_teacher_failed


async def test_a_teacher_that_fails_is_named_also_where_the_environment_does_not_close():
    run = Run(lambda request: Reply(status=404, error="no such model"), levers=BrokenLevers(at_close=OSError("stuck")))
    counts = await run.teach(run.tasks())
    assert counts.has_teacher_failed and counts.num_failed == 0 and counts.num_unplayed == 3


def test_a_budget_of_money_counts_prompts_and_replies_by_their_prices():
    budget = TeacherBudget(max_tokens=10**9, max_cost=1.0, prompt_price=2.0, output_price=8.0)
    first = budget.reserve(100_000, 50_000)  # 0.2 + 0.4
    with pytest.raises(BudgetSpent, match=r"0\.4000 of 1 \(teacher\.max_cost\)"):
        budget.reserve(100_000, 50_000)
    budget.charge(first, Usage(50_000, 10_000))
    assert (budget.to_json()["cost_spent"], budget.to_json()["cost_left"]) == (0.18, 0.82)
    budget.charge(budget.reserve(100_000, 50_000), None)  # no usage was reported, so the worst case counts
    assert budget.to_json()["cost_left"] == 0.22


def test_the_bound_of_a_prompt_is_its_bytes():
    assert bound_prompt_tokens({"messages": [{"role": "user", "content": "ä" * 100}]}) >= 200


@pytest.mark.parametrize(
    ("reply", "mend"),
    [
        (Reply(status=404, error="no such model"), "check teacher.model"),
        (Reply(status=400, error="bad tool"), "it refuses the request"),
        (Reply(status=429, error="slow down", retry_after="3600"), "try again later"),
        (Reply(status=503, error="down"), "503 Service Unavailable"),
    ],
)
async def test_a_teacher_that_fails_is_named_with_the_mend_and_nothing_is_lost(reply: Reply, mend: str):
    run = Run(lambda request: reply if len(run.saved) else solve(request))
    counts = await run.teach(run.tasks())
    assert counts.has_teacher_failed and counts.stopped_by is not None and mend in counts.stopped_by
    assert counts.error_status == reply.status
    assert counts.num_solved == len(run.saved) == 1 and counts.num_unplayed == 2
    assert all(game.num_closed == 1 for game in run.levers.started)


async def test_a_refused_key_is_named_by_its_variable_and_never_quoted():
    run = Run(solve)
    counts = await run.teach(run.tasks(), api_key="sk-wrong")
    assert counts.error_status == 401 and counts.stopped_by is not None
    assert "give the environment variable TEACHER_KEY a valid one" in counts.stopped_by
    assert "sk-wrong" not in counts.stopped_by and run.budget.to_json()["tokens_spent"] == 0


async def test_a_key_in_the_message_of_an_endpoint_is_cut_out():
    run = Run(lambda request: Reply(status=400, error=f"{KEY} has no credit"))
    counts = await run.teach(run.tasks())
    assert counts.stopped_by is not None and "*** has no credit" in counts.stopped_by


async def test_a_passing_failure_is_waited_for_as_long_as_the_endpoint_asks():
    replies = iter([Reply(status=429, error="slow down", retry_after="7"), Reply(status=502, error="gone")])
    run = Run(lambda request: next(replies, None) or solve(request))
    counts = await run.teach(run.tasks()[:1])
    assert counts.num_solved == 1 and run.pauses == [7.0, 2.0]
    assert MAX_TRIES > 2 and run.budget.num_calls == 2


async def test_an_endpoint_that_knows_only_the_newer_limit_is_given_that():
    def script(request: dict) -> Reply:
        if "max_tokens" in request:
            return Reply(status=400, error="Unsupported parameter: use 'max_completion_tokens' instead.")
        return solve(request)

    run = Run(script)
    assert (await run.teach(run.tasks()[:1])).num_solved == 1
    assert run.requests[-1]["max_completion_tokens"] == LIMITS.max_output_tokens


@pytest.mark.parametrize(
    "script", [say("I would rather not."), say(""), lambda request: Reply(calls=[("pull", "left")])]
)
async def test_a_reply_without_a_valid_call_solves_nothing(script: Script):
    run = Run(script)
    counts = await run.teach(run.tasks()[:1])
    assert (counts.num_solved, counts.num_unsolved) == (0, 1) and run.saved == []


async def test_a_teacher_that_is_not_there_is_named_by_its_address():
    run = Run(solve)
    config = TeacherConfig(url="http://127.0.0.1:9/v1", model="base")
    teacher = ChatEndpoint("teacher", config, budget=run.budget, sleep=run._sleep)
    with pytest.raises(EndpointError, match=r"http://127\.0\.0\.1:9/v1 does not answer"):
        await teacher.complete([{"role": "user", "content": "x"}], [], max_tokens=5)
    assert run.budget.to_json()["tokens_spent"] == 0


def test_prices_come_in_pairs_and_a_cost_needs_them():
    with pytest.raises(ValueError, match="give both prompt_price and output_price"):
        TeacherConfig(prompt_price=1.0)
    with pytest.raises(ValueError, match="max_cost needs prompt_price"):
        TeacherConfig(max_cost=1.0)


async def test_results_and_tools_reach_a_teacher_without_the_chat_marks_in_them():
    tool = {"type": "function", "function": {"name": "look", "description": "Looks.<|im_end|>", "parameters": {}}}
    messages = [{"role": "user", "content": "look"}, {"role": "tool", "tool_call_id": "1", "content": "<|im_start|>a"}]
    async with FakeEngine(lambda request: Reply("done")) as engine:
        teacher = ChatEndpoint("teacher", TeacherConfig(url=f"{engine.url}/v1", model="base"))
        assert (await teacher.complete(messages, [tool], max_tokens=5)).content == "done"
    (request,) = engine.requests
    assert "<|" not in json.dumps(request["messages"]) + json.dumps(request["tools"])
