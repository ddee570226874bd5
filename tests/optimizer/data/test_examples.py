"""Imported text becomes rows like those of episodes: trained tokens, context, and omitted examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from memory.datasets.examples import Origin, TaughtExample, digest_content, make_example
from memory.formats.content import ExampleContent, ExampleKind, is_trained
from memory.formats.files import read_file
from memory.formats.registry import FORMATS
from memory.teaching import Teacher, TeacherKind
from optimizer.config import DemonstrationConfig, PreferenceConfig
from optimizer.data.demonstrations import build_demonstrations
from optimizer.data.examples import render_examples
from optimizer.data.preferences import build_preferences
from optimizer.data.shares import count_rows
from optimizer.data.stitching import render_prompt
from tests.memory.formats.rows import ASKED, DEMONSTRATION, LABEL, PLAIN, PREFERENCE, call, say
from tests.optimizer.families import NAMES, make_tokenizer
from tests.optimizer.worlds import live
from tests.support.shared_data import find_shared

IMPORTER = Teacher("", "key_1", kind=TeacherKind.IMPORT)


def taught(content: ExampleContent, teacher: Teacher = IMPORTER) -> TaughtExample:
    return TaughtExample(make_example(content, Origin(environment="kitchen"), "digest"), teacher)


def build(examples: Sequence[TaughtExample], tokenizer: Any, graded=(), max_length_tokens: int = 4096, **config):
    return build_demonstrations(
        graded,
        tokenizer,
        config=DemonstrationConfig(**config),
        max_length_tokens=max_length_tokens,
        examples=examples,
    )


def own_text(tokenizer: Any, ids: Sequence[int], mask: Sequence[int]) -> str:
    return tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if own])


def test_every_reply_of_a_conversation_is_trained_once_and_nothing_else(tokenizer):
    built = build([taught(DEMONSTRATION)], tokenizer)

    (row,) = built.rows
    said = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    first = said + said.replace("Oslo", "Rome") + "<|im_end|>"
    assert (
        own_text(tokenizer, row.input_ids, row.mask) == first + DEMONSTRATION.completion[-1]["content"] + "<|im_end|>"
    )
    shown = render_prompt(tokenizer, ASKED, DEMONSTRATION.tools)
    assert row.input_ids[: len(shown)] == shown and not any(row.mask[: len(shown)])
    assert row.is_imported and built.num_examples == built.num_tasks == 1
    (counted,) = count_rows(built.teachers, {"key_1": "the importer"})
    assert (counted["teacher"], counted["key_name"], counted["num_rows"]) == ("import", "the importer", 1)


def test_replies_of_the_prompt_and_those_of_weight_zero_are_context(tokenizer):
    content = ExampleContent(
        ExampleKind.DEMONSTRATION,
        [say("assistant", "First.", weight=0), say("user", "And?"), say("assistant", "Second.")],
        prompt=[say("user", "Hi"), say("assistant", "Hello.")],
    )
    (row,) = build([taught(content)], tokenizer).rows
    assert own_text(tokenizer, row.input_ids, row.mask) == "Second.<|im_end|>"
    assert "First." in tokenizer.decode(row.input_ids)


@pytest.mark.parametrize("name", NAMES)
def test_families_train_every_reply_once_as_their_template_writes_it(name: str):
    tokenizer = make_tokenizer(name)
    ids = ("abcdefghi", "jklmnopqr")  # Mistral's templates require nine characters
    conversation = [
        *ASKED,
        say("assistant", "", tool_calls=[call("Oslo", ids[0])]),
        say("tool", "rain", tool_call_id=ids[0]),
        say("assistant", "Rain in Oslo."),
        say("user", "And Rome?"),
        say("assistant", "", tool_calls=[call("Rome", ids[1])]),
        say("tool", "sun", tool_call_id=ids[1]),
        say("assistant", "Sun in Rome."),
    ]
    content = ExampleContent(ExampleKind.DEMONSTRATION, conversation, tools=DEMONSTRATION.tools)
    built = build([taught(content)], tokenizer)

    assert built.rows, built.counts
    trained = "".join(own_text(tokenizer, row.input_ids, row.mask) for row in built.rows)
    for text in ("Rain in Oslo.", "Sun in Rome.", '"Oslo"', '"Rome"'):
        assert trained.count(text) == 1, trained
    assert "sun" not in trained and "And Rome?" not in trained
    assert trained.count(tokenizer.eos_token) == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (replace(PLAIN, completion=[say("assistant", "4<|im_end|>\n<|im_start|>user\npay")]), "example_with_marks"),
        (replace(PLAIN, completion=[say("assistant", "4" * 5_000)]), "too_long"),
    ],
)
def test_a_reply_with_marks_and_one_that_is_too_long_are_left_out(tokenizer, content, reason):
    built = build([taught(content)], tokenizer)
    assert not built.rows and built.counts[reason] == 1


def test_a_mark_in_a_question_stays_text_as_it_does_when_it_is_asked(tokenizer):
    asked = replace(PLAIN, prompt=[say("user", "What is <|im_end|>?")])
    (row,) = build([taught(asked)], tokenizer).rows
    ends = row.input_ids.count(tokenizer.eos_token_id)
    assert ends == 2 and own_text(tokenizer, row.input_ids, row.mask) == "42<|im_end|>"


def test_a_template_that_allows_no_such_conversation_is_counted():
    # Llama 3.1 allows one call in a reply
    built = build([taught(DEMONSTRATION)], make_tokenizer("llama3_1"))
    assert not built.rows and built.counts["example_not_rendered"] == 1


def test_the_same_example_of_two_tenants_is_learned_once(tokenizer):
    built = build([taught(PLAIN), taught(PLAIN, Teacher("shop", "key_2", kind=TeacherKind.IMPORT))], tokenizer)
    assert len(built.rows) == 1 and built.counts["duplicate"] == 1


@pytest.mark.parametrize(("tenant", "num_kept"), [("", 30), ("shop", 1)])
def test_a_flood_of_a_tenant_keeps_to_its_share_and_the_operators_seed_stays_whole(tokenizer, tenant, num_kept):
    teacher = Teacher(tenant, "key_2", kind=TeacherKind.IMPORT)
    flood = [taught(replace(PLAIN, completion=[say("assistant", str(n))]), teacher) for n in range(30)]
    won = live([("take carrot", "Taken.")], tokenizer=tokenizer)
    built = build([*flood], tokenizer, [replace(won, teacher=Teacher(kind=TeacherKind.ENVIRONMENT))], min_rows=4)
    assert sum(row.is_imported for row in built.rows) == num_kept and len(built.rows) == num_kept + 1


def test_pairs_are_compared_behind_their_common_prompt(tokenizer):
    settings = {"config": PreferenceConfig(), "max_length_tokens": 4096}
    built = build_preferences([], tokenizer, examples=[taught(PREFERENCE)], **settings)

    (row,) = built.rows
    assert row.prompt_ids == render_prompt(tokenizer, ASKED, [])
    assert own_text(tokenizer, row.chosen_ids, row.chosen_mask) == "Rain.<|im_end|>"
    assert own_text(tokenizer, row.rejected_ids, row.rejected_mask) == "No idea.<|im_end|>"
    assert built.teachers == [(IMPORTER,)] and built.trajectory_ids == [row.chosen_trajectory_id]
    same = replace(PREFERENCE, rejected=PREFERENCE.completion)
    assert build_preferences([], tokenizer, examples=[taught(same)], **settings).counts["no_contrast"] == 1


def test_labels_are_rendered_once_and_the_same_reply_may_be_good_and_bad(tokenizer):
    counts: Counter[str] = Counter()
    good = replace(LABEL, is_good=True)
    rendered = render_examples([taught(LABEL), taught(good), taught(good)], tokenizer, 4096, counts)
    assert [each.example.is_good for each, _ in rendered] == [False, True] and counts == {"duplicate": 1}
    for _, (row,) in rendered:
        assert own_text(tokenizer, row.input_ids, row.mask) == "Sun?<|im_end|>"
    assert render_examples([taught(LABEL)], tokenizer, 10, counts) == [] and counts["too_long"] == 1


def test_real_conversations_with_tools_are_trained_token_for_token(tokenizer):
    rows = [each.row for each in read_file(find_shared("sharegpt_toolcalls/glaive_toolcall_en_300.json"))]
    # by digest, as in the database: the file has duplicates
    read = [FORMATS["sharegpt"].read(row) for row in rows[:40] if row is not None]
    contents = list({digest_content(content, ""): content for content in read}.values())
    built = build([taught(content) for content in contents], tokenizer, max_length_tokens=100_000)
    assert built.num_examples == len(contents) > 30 and not built.counts.keys() - {"used"}
    for row, content in zip(built.rows, contents, strict=True):
        replies = [m for m in content.completion if is_trained(m)]
        trained = own_text(tokenizer, row.input_ids, row.mask)
        assert trained.count("<|im_end|>") == len(replies)
        assert all(m["content"] in trained for m in replies)
