"""Builds a verifier's rows: an episode as the agent saw and wrote it, the question whether it succeeded, yes or no.

Cobbe et al. 2021 (arXiv 2110.14168) train a verifier on a model's own solutions; GenRM (Zhang et al. 2024, arXiv
2408.15240) lets it answer with a token of the language model, which a LoRA can learn without a head of its own.
Invariant: the loss is on the answer's token alone. What an environment says after the last reply is no part of a row:
it would give the answer away.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jinja2

from memory.records.trajectories import GradedTrajectory
from memory.schema import RewardSource, Step, Trajectory
from memory.team import is_actors
from optimizer.data.stitching import Tokenizer, Unstitchable, plan_memory_removal, remove_memory, render_text, stitch

QUESTION = "Did the assistant do what was asked? Answer yes or no."
ANSWERS = ("yes", "no")
OPENING = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
SHARES = (("training", 0.6), ("calibration", 0.2), ("test", 0.2))
"""Of the tasks. Weights are fitted to the first part, temperature and threshold to the second; the third measures."""


@dataclass(frozen=True)
class Question:
    """The token ids of the question behind an episode, and of the two answers."""

    suffix: list[int]
    eos: int
    yes: int
    no: int

    def put_to(self, token_ids: Sequence[int]) -> list[int]:
        """Return the prompt that asks about the episode with these tokens."""
        # A reply that was cut has no end, and the template would never begin a message there.
        end = [] if token_ids[-1] == self.eos else [self.eos]
        return [*token_ids, *end, *self.suffix]


@dataclass(frozen=True)
class VerifierRow:
    """One episode with the question; the loss counts where `mask` is 1, on the answer."""

    trajectory_id: str
    input_ids: list[int]
    mask: list[int]


@dataclass(frozen=True)
class VerifierExample:
    """One graded episode."""

    trajectory_id: str
    task: tuple[str, str, str]
    prompt_ids: list[int]
    is_success: bool
    is_by_person: bool


def frame_question(tokenizer: Tokenizer) -> Question:
    """Return the question as the chat template writes it.

    Raises:
        ValueError: the template or the tokenizer cannot ask it.
    """
    asked = [*OPENING, {"role": "user", "content": QUESTION}]
    try:
        before = render_text(tokenizer, OPENING[:1], (), add_generation_prompt=True)
        whole = render_text(tokenizer, asked, (), add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template cannot ask a verifier's question: {error}") from None
    ids = _tokenize(tokenizer, whole[len(before) :])
    eos = tokenizer.eos_token_id
    if not whole.startswith(before) or eos is None or eos not in ids:
        raise ValueError("the chat template cannot ask a verifier's question: a reply in it has no end")
    yes, no = (_tokenize(tokenizer, answer)[0] for answer in ANSWERS)
    if yes == no:
        raise ValueError(f"the tokenizer writes {ANSWERS[0]!r} and {ANSWERS[1]!r} with the same first token")
    return Question(ids[ids.index(eos) + 1 :], eos, yes, no)


def _tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_episode(
    trajectory: Trajectory, steps: Sequence[Step], tokenizer: Tokenizer, question: Question, max_length_tokens: int
) -> list[int]:
    """Return the prompt that asks about an episode, without its memory segment.

    Raises:
        Unstitchable: nothing may be learned from it, or it cannot be a row.
    """
    if not trajectory.may_teach:
        raise Unstitchable("untrusted")
    rows, _ = stitch([step for step in steps if is_actors(step)])
    # The last row: where the template rewrites earlier replies, its prompt holds all of them as context.
    row = remove_memory(rows[-1], plan_memory_removal(trajectory, tokenizer))
    prompt = question.put_to(row.input_ids)
    if len(prompt) >= max_length_tokens:  # and the answer
        raise Unstitchable("too_long")
    return prompt


def build_examples(
    graded: Iterable[GradedTrajectory],
    tokenizer: Tokenizer,
    question: Question,
    *,
    per_task: int,
    max_length_tokens: int,
    counts: Counter[str],
) -> list[VerifierExample]:
    """Return the graded episodes as examples: of each task the newest, as many good as bad ones at the most. What is
    left out is counted by reason. A verifier's own grades are none: it would learn from itself."""
    taken: Counter[tuple[object, ...]] = Counter()
    examples = []
    for each in sorted(graded, key=lambda each: each.trajectory.id, reverse=True):
        key = (*each.trajectory.task_key, each.is_success)
        try:
            if each.source is RewardSource.VERIFIER:
                raise Unstitchable("by_a_verifier")
            if taken[key] == per_task:
                raise Unstitchable("over_task_cap")
            prompt = render_episode(each.trajectory, each.steps, tokenizer, question, max_length_tokens)
        except Unstitchable as reason:
            counts[str(reason)] += 1
            continue
        taken[key] += 1
        is_by_person = each.source is RewardSource.USER
        task = each.trajectory.task_key
        examples.append(VerifierExample(each.trajectory.id, task, prompt, each.is_success, is_by_person))
    counts["used"] = len(examples)
    return examples[::-1]


def split_by_task(examples: Sequence[VerifierExample], seed: int) -> dict[str, list[VerifierExample]]:
    """Return the examples of each part of `SHARES`; all episodes of a task are in one part.

    Tasks of different tenants or environments count as different, also where their texts are the same.
    """
    by_task: dict[tuple[str, str, str], list[VerifierExample]] = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example)
    tasks = sorted(by_task)
    random.Random(seed).shuffle(tasks)
    parts, start, share_so_far = {}, 0, 0.0
    for name, share in SHARES:
        share_so_far += share
        end = round(share_so_far * len(tasks))
        parts[name] = [example for task in tasks[start:end] for example in by_task[task]]
        start = end
    return parts


def to_row(example: VerifierExample, question: Question) -> VerifierRow:
    """Return the row that trains the right answer."""
    answer = question.yes if example.is_success else question.no
    mask = [0] * len(example.prompt_ids) + [1]
    return VerifierRow(example.trajectory_id, [*example.prompt_ids, answer], mask)
