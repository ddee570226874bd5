"""Every format: written rows are read back unchanged, real files are read whole, and bad rows name the fix."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from memory.datasets.examples import digest_content
from memory.formats.content import BadRow, ExampleContent, ExampleKind, NotExpressible, is_trained
from memory.formats.files import read_file
from memory.formats.registry import FORMATS, find_format, recognise_row, recognise_rows, require_holds, write_row
from tests.memory.formats.rows import ASKED, CALLED, DEMONSTRATION, LABEL, PLAIN, PREFERENCE, ROUND_TRIPS, WEATHER, say
from tests.support.shared_data import find_shared

REAL_FILES = [
    ("messages_sft/tinker_conversations.jsonl", "openai", {"demonstration": 128}),
    ("sharegpt_toolcalls/glaive_toolcall_en_300.json", "sharegpt", {"demonstration": 300}),
    ("sharegpt_toolcalls/dpo_en_first60.json", "sharegpt", {"preference": 60}),
    ("sharegpt_toolcalls/kto_en_first60.json", "trl", {"label": 60}),
    ("smart_trajectory/long_trajectory.json", "smart", {"demonstration": 4}),
    ("smart_trajectory/short_trajectory.json", "smart", {"demonstration": 4}),
    ("xlam_form/xlam_form_from_bfcl_50.jsonl", "xlam", {"demonstration": 50}),
    ("tau_bench/trajectories_gpt4o_airline.jsonl", "tau-bench", {"demonstration": 200}),
    ("gsm8k/train.jsonl", "question-answer", {"demonstration": 7473}),
]


def read_real(name: str) -> list[tuple[dict, ExampleContent, str]]:
    """Return (row, content, name of the format) of every row of a real file."""
    read = []
    for each in read_file(find_shared(name)):
        assert each.row is not None, each.error
        recognised, _ = recognise_row(each.row)
        read.append((each.row, recognised.read(each.row), recognised.name))
    return read


def trained_texts(content: ExampleContent) -> list[str]:
    """Return all trained messages as text."""
    return [json.dumps([m["content"], m.get("tool_calls")]) for m in content.completion if is_trained(m)]


@pytest.mark.parametrize(("name", "format_name", "kinds"), REAL_FILES)
def test_a_real_file_is_recognised_and_read_whole_and_written_again(name: str, format_name: str, kinds: dict):
    read = read_real(name)
    assert Counter(content.kind.value for _, content, _ in read) == kinds
    assert {of for _, _, of in read} == {format_name}
    format_ = FORMATS[format_name]
    for _, content, _ in read:
        assert format_.read(write_row(content, format_, source=format_name)) == content


@pytest.mark.parametrize("name", ["smart_trajectory/long_trajectory.json", "smart_trajectory/short_trajectory.json"])
def test_a_trajectory_of_smart_is_written_as_the_same_json(name: str):
    for row, content, _ in read_real(name):
        assert write_row(content, FORMATS["smart"], source="smart") == row


def test_what_a_retriever_found_is_not_trained():
    for row, content, _ in read_real("smart_trajectory/long_trajectory.json"):
        trained = "".join(trained_texts(content))
        assert "<retrieval>" in row["output"] and "<retrieval>" not in trained and "Locator" in trained


def test_calls_and_observations_of_sharegpt_become_calls_and_their_results():
    read = read_real("sharegpt_toolcalls/glaive_toolcall_en_300.json")
    with_calls = [content for _, content, _ in read if any(m.get("tool_calls") for m in content.completion)]
    assert len(with_calls) == sum("function_call" in json.dumps(row) for row, _, _ in read) > 50
    for content in with_calls:
        calls = {call["id"] for m in content.completion for call in m.get("tool_calls", ())}
        results = [m["tool_call_id"] for m in content.completion if m["role"] == "tool"]
        assert set(results) <= calls and len(results) == len(set(results)) and content.tools


def test_the_types_of_xlam_become_json_schema():
    kinds = Counter(
        schema.get("type")
        for _, content, _ in read_real("xlam_form/xlam_form_from_bfcl_50.jsonl")
        for tool in content.tools
        for schema in tool["function"]["parameters"]["properties"].values()
    )
    assert kinds.keys() == {"integer", "string", "number", "boolean", "array", "object"}


def test_the_rewards_of_tau_bench_are_kept():
    rewards = Counter(content.reward for _, content, _ in read_real("tau_bench/trajectories_gpt4o_airline.jsonl"))
    assert rewards == {1.0: 84, 0.0: 116}


@pytest.mark.parametrize(("name", "content"), ROUND_TRIPS, ids=lambda it: it if isinstance(it, str) else it.kind.value)
def test_what_is_written_is_recognised_and_read_as_it_was(name: str, content: ExampleContent):
    row = json.loads(json.dumps(write_row(content, FORMATS[name])))
    recognised, _ = recognise_row(row)
    assert recognised.name == name
    again = recognised.read(row)
    # Alpaca's and SMART's rows have extra fields
    assert replace(again, extra={}) == content


@pytest.mark.parametrize("name", ["trl", "sharegpt", "ratchet", "openai"])
def test_a_conversation_with_tools_passes_through_other_formats(name: str):
    for _, content, _ in read_real("sharegpt_toolcalls/glaive_toolcall_en_300.json"):
        again = FORMATS[name].read(write_row(content, FORMATS[name], source="sharegpt"))
        assert trained_texts(again) == trained_texts(content) and again.tools == content.tools


def test_a_prompts_replies_stay_untrained_in_a_format_of_one_conversation():
    content = replace(PLAIN, prompt=[say("user", "Hi"), say("assistant", "Hello"), *PLAIN.prompt])
    for name in ("openai", "sharegpt"):
        again = FORMATS[name].read(write_row(content, FORMATS[name]))
        assert trained_texts(again) == trained_texts(content)


def test_agentinstruct_marks_of_loss_are_obeyed():
    turns = [
        {"from": "human", "loss": None, "value": "You are in a house."},
        {"from": "gpt", "loss": False, "value": "OK."},
        {"from": "human", "loss": None, "value": "Find a cup."},
        {"from": "gpt", "loss": True, "value": "Thought: look.\nAction: go to shelf 1"},
    ]
    content = FORMATS["sharegpt"].read({"conversations": turns, "id": "os_0"})
    assert [m["content"] for m in content.completion if is_trained(m)] == ["Thought: look.\nAction: go to shelf 1"]


def test_pairs_of_eto_are_read():
    turns = [{"from": "human", "value": "Find a cup."}]
    row = {
        "id": 3,
        "prompt": turns,
        "chosen": [{"from": "gpt", "value": "Action: open shelf"}, {"from": "human", "value": "Observation: a cup"}],
        "rejected": [{"from": "gpt", "value": "Action: wait"}],
    }
    recognised, _ = recognise_row(row)
    content = recognised.read(row)
    assert recognised.name == "sharegpt" and content.kind is ExampleKind.PREFERENCE and content.extra == {"id": 3}
    assert [m["role"] for m in content.completion] == ["assistant", "user"]


def test_texts_of_trl_become_messages_and_an_implicit_prompt_is_found():
    read = FORMATS["trl"].read
    assert read({"prompt": "Sky?", "completion": "Blue.", "label": True}).prompt == [say("user", "Sky?")]
    begun = [say("user", "Sky?")]
    pair = read({"chosen": [*begun, say("assistant", "Blue.")], "rejected": [*begun, say("assistant", "Red.")]})
    assert (pair.prompt, pair.rejected) == (begun, [say("assistant", "Red.")])
    with pytest.raises(BadRow, match="must begin alike"):
        read({"chosen": "Blue.", "rejected": "Red."})


@pytest.mark.parametrize(("name", "field"), [("trl", "prompt"), ("instruction-preference", "instruction")])
def test_a_prompt_that_both_sides_repeat_is_learned_once(name: str, field: str):
    asked = say("user", "Sky?")
    blue, red = say("assistant", "Blue."), say("assistant", "Red.")
    content = FORMATS[name].read({field: "Sky?", "chosen": [asked, blue], "rejected": [asked, red]})
    assert (content.prompt, content.completion, content.rejected) == ([asked], [blue], [red])
    called = say("assistant", "Hi")
    with pytest.raises(BadRow, match="need a message behind the prompt"):
        FORMATS[name].read({field: [called], "chosen": [called], "rejected": [called]})


def test_tools_of_xlam_may_have_json_schemas():
    row = {
        "query": "How is Oslo?",
        "answers": [{"name": "weather", "arguments": {"city": "Oslo"}}],
        "tools": [WEATHER["function"]],
    }
    assert FORMATS["xlam"].read(row).tools == [WEATHER]
    row["tools"] = [{"name": "weather", "parameters": {"city": "Oslo"}}]
    with pytest.raises(BadRow, match="must be an object that describes each parameter"):
        FORMATS["xlam"].read(row)


def test_calls_of_the_older_form_and_objects_as_arguments_are_read_alike():
    old = say("assistant", None, function_call={"name": "weather", "arguments": '{"city": "Oslo"}'})
    new = say("assistant", "", tool_calls=[{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}])
    first, second = (
        FORMATS[name].read({"messages": [say("user", "?"), reply]}).completion
        for name, reply in (("openai", old), ("trl", new))
    )
    assert first == second and first[1]["tool_calls"][0]["id"]


@pytest.mark.parametrize(
    ("name", "row", "complaint"),
    [
        ("openai", {"messages": []}, "at least one"),
        ("openai", {"messages": [say("user", "hi")]}, "no assistant message"),
        ("openai", {"messages": [say("narrator", "hi")]}, r"messages\[0\].role is 'narrator': use one of"),
        ("openai", {"messages": [say("user", 7)]}, r"messages\[0\].content must be text"),
        ("openai", {"messages": [say("user", "hi", mood="gay")]}, "unknown field 'mood': remove it"),
        ("openai", {"messages": [say("tool", "rain")]}, r"messages\[0\] is the result of no call"),
        ("openai", {"messages": [CALLED[0], say("tool", "rain", tool_call_id="x")]}, "no call before it has that id"),
        ("openai", {"messages": [say("assistant", "", tool_calls=[{"function": {}}])]}, "no function name"),
        ("openai", {"messages": [say("assistant", "a", weight=2)]}, "weight is 2: it is 0 or 1"),
        ("openai", {"messages": [say("assistant", "a")], "tools": [{}]}, r"tools\[0\] has no name"),
        ("trl", {"prompt": "a", "completion": "b", "label": "good"}, "'label' is 'good': use true"),
        ("trl", {"prompt": "a", "chosen": "b", "rejected": []}, "'rejected' must be a list"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, "from is 'robot': use one of human|system"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "'from' and a text 'value'"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{"}]}, "is a text that is no JSON"),
        ("instruction-preference", {"instruction": "a", "chosen": "b", "rejected": None}, "'rejected' must be a list"),
        ("smart", {"instruction": "a", "output": "<retrieval>x</retrieval>"}, "no reply to learn from"),
        ("alpaca", {"instruction": "", "output": "b"}, "must not be empty"),
        ("question-answer", {"question": 3, "answer": "b"}, "'question' must be a text, not 3"),
        ("xlam", {"query": "a", "answers": "[", "tools": "[]"}, "'answers' is a text that is no JSON"),
        ("xlam", {"query": "a", "answers": "[]", "tools": "[]"}, "'answers' has no call"),
        ("tau-bench", {"traj": [say("assistant", "a")], "reward": 2}, "'reward' is 2: it is a number from 0 to 1"),
        ("ratchet", {"kind": "wish", "completion": "a"}, "'kind' is 'wish': use one of demonstration"),
        ("ratchet", {"kind": "label", "completion": "a"}, "'is_good' is None"),
        ("ratchet", {"kind": "preference", "completion": "a"}, "'prompt' is missing"),
    ],
)
def test_a_bad_row_says_what_is_wrong(name: str, row: dict, complaint: str):
    with pytest.raises(BadRow, match=complaint):
        FORMATS[name].read(row)


def test_a_row_of_two_formats_or_of_none_is_no_guess():
    with pytest.raises(BadRow, match=r"may be of several formats: .*question-answer.*tau-bench"):
        recognise_row({"question": "a", "answer": "b", "traj": [], "reward": 1})
    with pytest.raises(BadRow, match=r"fields 'colour' is in no known format .*trl: messages"):
        recognise_row({"colour": "red"})
    with pytest.raises(BadRow, match=r"one row is question-answer .* and row 3 is alpaca"):
        recognise_rows([{"question": "a", "answer": "b"}, {"colour": "red"}, {"instruction": "a", "output": "b"}])
    with pytest.raises(ValueError, match="no format is called 'parquet': use one of openai"):
        find_format("parquet")


def test_a_format_refuses_what_it_cannot_hold():
    for name, content in (
        ("xlam", DEMONSTRATION),
        ("question-answer", DEMONSTRATION),
        ("alpaca", LABEL),
        ("smart", DEMONSTRATION),
        ("openai", LABEL),
        ("tau-bench", PREFERENCE),
    ):
        with pytest.raises(NotExpressible):
            write_row(content, FORMATS[name])
    with pytest.raises(ValueError, match="'openai' cannot hold a label: use one of trl, sharegpt, ratchet"):
        require_holds(FORMATS["openai"], ExampleKind.LABEL)


def test_sharegpt_refuses_results_in_another_order_than_their_calls():
    reply, first, second, answer = CALLED
    crossed = replace(DEMONSTRATION, completion=[*ASKED, reply, second, first, answer])
    with pytest.raises(NotExpressible, match="results in another order than their calls"):
        write_row(crossed, FORMATS["sharegpt"])
    only_second = replace(DEMONSTRATION, completion=[*ASKED, reply, second, answer])
    with pytest.raises(NotExpressible, match="results in another order than their calls"):
        write_row(only_second, FORMATS["sharegpt"])


def test_sharegpt_refuses_a_label_of_several_messages():
    with pytest.raises(NotExpressible, match="a label of several messages"):
        write_row(replace(LABEL, completion=CALLED), FORMATS["sharegpt"])


def test_a_broken_call_of_a_model_is_left_out_where_objects_are_wanted():
    broken = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{oops"}}
    content = replace(PLAIN, completion=[say("assistant", "", tool_calls=[broken])], tools=[WEATHER])
    with pytest.raises(NotExpressible, match="no JSON object"):
        write_row(content, FORMATS["trl"])


def test_no_row_whatever_breaks_a_reader():
    """Rows of known fields with values of any type are read, or refused with a reason."""
    dice = random.Random(5)
    fields = sorted(
        {name for each in FORMATS.values() for name in re.findall(r"\w+", each.fields)} | {"system", "input"}
    )
    inner = ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "id", "weight", "loss"]
    texts = [
        "",
        "hi",
        "user",
        "assistant",
        "tool",
        "human",
        "gpt",
        "function_call",
        "observation",
        "[]",
        "{",
        '[{"name": 1}]',
    ]

    def anything(depth: int) -> Any:
        kind = dice.randrange(8 if depth else 5)
        if kind < 5:
            return [None, dice.choice(texts), dice.choice([0, 1, -2, 0.5, float("nan")]), dice.random() < 0.5, "x"][
                kind
            ]
        if kind == 5:
            return [anything(depth - 1) for _ in range(dice.randrange(3))]
        return {name: anything(depth - 1) for name in dice.sample([*fields, *inner], 4)}

    def turns() -> list[dict[str, Any]]:
        """Return mostly valid turns: entirely wrong ones would be refused at once."""
        speakers = [("user", "human"), ("assistant", "gpt")] * dice.randrange(1, 3)
        return [
            {"role": role, "content": "hi", "from": speaker, "value": "hi"}
            | {name: anything(2) for name in dice.sample(inner, dice.choice([0, 0, 0, 1]))}
            for role, speaker in speakers
        ]

    num_read = num_refused = 0
    for _ in range(4_000):
        row = {name: turns() if dice.random() < 0.4 else anything(3) for name in dice.sample(fields, dice.randrange(7))}
        for format_ in FORMATS.values():
            format_.recognise(row)
            try:
                content = format_.read(row)
            except BadRow as error:
                assert str(error)
                num_refused += 1
            else:
                num_read += 1
                assert content.completion and digest_content(content, "")
    assert num_read > 100 and num_refused > 10_000
