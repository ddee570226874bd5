"""With the families' own chat templates, every token that the agent sampled is trained once, and no other token.

vLLM's part is replayed here: its own parsers split a reply, and the template renders it into the next prompt.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from memory.conversation import as_reply, show_memory
from memory.schema import Split, Step, StepKind, Trajectory, TrajectoryStage, new_id
from optimizer.config import DemonstrationConfig, PreferenceConfig
from optimizer.data.demonstrations import build_demonstrations
from optimizer.data.preferences import build_preferences
from optimizer.data.stitching import plan_memory_removal, remove_memory, stitch
from optimizer.rewards import GradedTrajectory
from tests.optimizer.families import NAMES, Family, make_tokenizer
from tests.optimizer.worlds import ACT

ROOT = Path(__file__).parents[3]
MEMORY = "<memory>\nInsights:\n- fry the _ -> cook _ with stove\n</memory>"
OPENING = [{"role": "system", "content": "You cook."}, {"role": "user", "content": "Make a meal."}]


def act(command: str) -> tuple[str, dict[str, Any]]:
    return "act", {"command": command}


CASES: dict[str, Callable[[Family, str], str]] = {
    "thought_and_call": lambda family, command: family.write("I will do it.", [act(command)]),
    "blank_line_before_call": lambda family, command: family.write("I will do it.\n\n", [act(command)]),
    "parallel_calls": lambda family, command: family.write("", [act("look"), act(command)]),
    "compact_json": lambda family, command: family.write("Now.", [act(command)], compact=True),
    "think_and_call": lambda family, command: family.write("<think>\nHm.\n</think>\n\n", [act(command)]),
    "think_thought_and_call": lambda family, command: family.write("<think>\nHm.\n</think>\n\nSo.", [act(command)]),
    "call_without_text": lambda family, command: family.write("", [act(command)]),
    "plain_answer": lambda family, command: family.write(f"I would {command}.", []),
    "think_and_plain_answer": lambda family, command: family.write(f"<think>\nHm.\n</think>\n\nI {command}.", []),
}
REFUSED = {("llama3_1", "parallel_calls"), ("llama3_2", "parallel_calls")}
"""These templates cannot render a reply with two calls, so the engine refuses the next prompt."""


def replies_of(family: Family, case: str, command: str) -> list[str]:
    return [CASES[case](family, "take carrot"), CASES[case](family, command), "Done."]


@cache
def tokenizer_of(name: str) -> Any:
    return make_tokenizer(name)


@pytest.fixture(scope="module")
def parsed() -> dict[tuple[str, str], dict[str, Any]]:
    """The output of vLLM's parsers for every reply in this file, by family and text."""
    commands = ("cook carrot with stove", "cook carrot with oven")
    texts = {
        (name, text)
        for name in NAMES
        for case in CASES
        for command in commands
        for text in replies_of(Family(name), case, command)
    }
    pairs = sorted(texts)
    child = subprocess.run(
        [sys.executable, "-m", "tests.optimizer.families"],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return dict(zip(pairs, json.loads(child.stdout.splitlines()[-1]), strict=True))


def render(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """Return the prompt as the engine renders it: arguments as objects, then the family's template."""
    served = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
            for call in message.get("tool_calls", [])
        ]
        served.append(message | ({"tool_calls": calls} if calls else {}))
    text = tokenizer.apply_chat_template(served, tools=[ACT], add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def play(
    name: str, case: str, parsed: dict, command: str = "cook carrot with stove", *, memory_text: str = "", **grade: Any
) -> GradedTrajectory:
    """Return an episode of three replies, each sampled after the rendered prompt of the ones before."""
    tokenizer = tokenizer_of(name)
    trajectory = Trajectory(
        id=new_id("trj"),
        episode_id=new_id("epi"),
        environment="kitchen",
        task="1",
        kind="cooking",
        split=Split.PRACTICE,
        task_text="Make a meal.",
        policy=0,
        stage=TrajectoryStage.FINISHED,
        opening=OPENING,
        tools=[ACT],
        memory_text=memory_text,
    )
    messages, steps = show_memory(OPENING, memory_text), []

    def record(kind: StepKind, **said: Any) -> None:
        steps.append(Step(trajectory_id=trajectory.id, position=len(steps), kind=kind, **said))

    for text in replies_of(Family(name), case, command):
        try:
            prompt = render(tokenizer, messages)
        except TemplateError:
            assert (name, case) in REFUSED
            break
        output = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        reply = parsed[name, text]
        record(StepKind.MODEL, **reply, prompt_token_ids=prompt, output_token_ids=output, finish_reason="stop")
        messages.append(as_reply(reply["content"], reply["tool_calls"]))
        for call in reply["tool_calls"]:
            record(StepKind.TOOL, content="It is done.", tool_name="act", tool_call_id=call["id"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": "It is done."})
        if not reply["tool_calls"]:
            record(StepKind.USER, content="And then?")
            messages.append({"role": "user", "content": "And then?"})
    is_success = grade.get("is_success", True)
    return GradedTrajectory(trajectory, steps, float(is_success), is_success)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_every_token_of_the_agent_is_trained_once_behind_what_it_saw_and_no_other_token_is(name, case, parsed):
    played = play(name, case, parsed)

    rows, _ = stitch(played.steps)

    outputs = [step.output_token_ids for step in played.model_steps]
    own = [token for row in rows for token, mine in zip(row.input_ids, row.mask, strict=True) if mine]
    assert own == [token for output in outputs for token in output]
    for row in rows:
        for number in range(row.first_step, row.last_step + 1):
            start, step = row.start_of(number), played.model_steps[number]
            assert row.input_ids[:start] == step.prompt_token_ids
            assert all(row.mask[start : start + len(step.output_token_ids)])


@pytest.mark.parametrize("case", ["thought_and_call", "blank_line_before_call", "parallel_calls", "call_without_text"])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_calls_of_qwen_as_it_is_taught_to_write_them_stay_one_row(name, case, parsed):
    rows, tally = stitch(play(name, case, parsed).steps)

    assert len(rows) == 1 and tally == {"clean": 2}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_the_memory_segment_leaves_every_row_as_if_it_had_not_been_shown(name, case, parsed):
    shown, bare = (play(name, case, parsed, memory_text=text) for text in (MEMORY, ""))
    edits = plan_memory_removal(shown.trajectory, tokenizer_of(name))

    removed = [remove_memory(row, edits) for row in stitch(shown.steps)[0]]

    assert removed == stitch(bare.steps)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_demonstrations_train_all_that_the_agent_said(name, case, parsed):
    played = play(name, case, parsed, memory_text=MEMORY)

    built = build_demonstrations(
        [played], tokenizer_of(name), config=DemonstrationConfig(keep_memory_share=0), max_length_tokens=8192
    )

    assert built.num_examples == 1 and built.trained_share == 1.0
    assert built.own_tokens == sum(len(step.output_token_ids) for step in played.model_steps)
    assert sum(sum(row.mask) for row in built.rows) == built.own_tokens


@pytest.mark.parametrize("scope", ["remainder", "step"])
@pytest.mark.parametrize(("name", "case"), sorted({(name, case) for name in NAMES for case in CASES} - REFUSED))
def test_episodes_that_differ_only_in_an_argument_differ_in_their_trained_tokens(name, case, scope, parsed):
    won = play(name, case, parsed)
    lost = play(name, case, parsed, "cook carrot with oven", is_success=False)
    tokenizer = tokenizer_of(name)

    (row,) = build_preferences(
        [won, lost], tokenizer, config=PreferenceConfig(scope=scope), max_length_tokens=8192
    ).rows

    own = [
        tokenizer.decode([token for token, mine in zip(ids, mask, strict=True) if mine])
        for ids, mask in ((row.chosen_ids, row.chosen_mask), (row.rejected_ids, row.rejected_mask))
    ]
    assert "stove" in own[0] and "oven" not in own[0]
    assert "oven" in own[1] and "stove" not in own[1]
    assert row.prompt_ids == won.model_steps[1].prompt_token_ids
