"""GSM8K, MATH and HumanEval for Inspect, from local files instead of a hub.

Prompts, records and scorers are those of the package `inspect_evals`; only the rows come from elsewhere. Departures:
another generator draws the worked examples of GSM8K, and MATH has its two scorers of exact matches, without the one
that asks a model. Nothing here knows what answers behind `OPENAI_BASE_URL`:

    pip install "inspect-evals[math]" openai
    export OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=none
    inspect eval docs/examples/inspect_tasks.py@math -T path=math500/test.jsonl --model openai/agent --temperature 0
"""

from __future__ import annotations

from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import Sample, json_dataset
from inspect_ai.scorer import match
from inspect_ai.solver import generate, prompt_template, system_message
from inspect_evals.constants import DEFAULT_FEWSHOT_SEED
from inspect_evals.gsm8k.gsm8k import MATH_PROMPT_TEMPLATE, sample_to_fewshot
from inspect_evals.gsm8k.gsm8k import record_to_sample as read_gsm8k_row
from inspect_evals.humaneval.humaneval import record_to_sample as make_humaneval_reader
from inspect_evals.humaneval.humaneval import verify
from inspect_evals.math.math import expression_exact_match, expression_exact_match_sympy, math_solver
from inspect_evals.math.utils import record_to_sample as read_math_row


@task
def gsm8k(path: str, train: str | None = None, fewshot: int = 10) -> Task:
    """Its rows are those of `test.jsonl`; with `train`, its `train.jsonl`, worked examples stand before each."""
    solver = [prompt_template(MATH_PROMPT_TEMPLATE), generate()]
    if train is not None:
        drawn = json_dataset(train, read_gsm8k_row, shuffle=True, seed=DEFAULT_FEWSHOT_SEED, limit=fewshot)
        solver.insert(0, system_message("\n\n".join(sample_to_fewshot(each) for each in drawn)))
    return Task(json_dataset(path, read_gsm8k_row), solver=solver, scorer=match(numeric=True))


@task
def math(path: str) -> Task:
    """Its rows are those of MATH-500: `subject` and `level` are called otherwise in MATH itself."""
    scorers = [expression_exact_match(), expression_exact_match_sympy()]
    return Task(json_dataset(path, read_math500_row), solver=math_solver(fewshot=0, fewshot_seed=0), scorer=scorers)


@task
def humaneval(path: str, sandbox: str = "docker") -> Task:
    """Its rows are those of `HumanEval.jsonl`. The sandbox `local` is none: the model's code runs as you do."""
    return Task(json_dataset(path, make_humaneval_reader()), solver=generate(), scorer=verify(), sandbox=sandbox)


def read_math500_row(row: dict[str, Any]) -> Sample:
    return read_math_row({**row, "level": str(row["level"]), "type": row["subject"]})
