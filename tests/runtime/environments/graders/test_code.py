"""Unit tests on a reply's code, in the real sandbox."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from runtime.environments.graders.base import GradingResources, Outcome, Submission
from runtime.environments.graders.code import UnitTests
from runtime.errors import ToolRefused

PROMPT = 'from math import sqrt\n\ndef double(number):\n    """Return twice the number."""\n'
RULE = UnitTests(type="unit_tests", prompt=PROMPT, entry_point="double", tests="assert double(2) == 4\n")

needs_bwrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="no 'bwrap' on the PATH: install bubblewrap to run code in the real sandbox"
)


async def grade(text: str, rule: UnitTests = RULE) -> Outcome:
    return await rule.grade(Submission(text), GradingResources())


@needs_bwrap
@pytest.mark.parametrize(
    "text",
    [
        "    return 2 * number\n",
        "def double(number):\n    return 2 * number",
        "It doubles:\n```python\ndef double(number):\n    return int(2 * sqrt(number) ** 2 + 0.5)\n```\nDone.",
        "```python\nprint(1)\n```\nor rather\n```python\ndef double(number):\n    return 2 * number\n```",
    ],
)
async def test_code_passes_bare_fenced_whole_or_as_a_continuation(text: str):
    assert (await grade(text)).value == 1.0


@needs_bwrap
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("    return number\n", "AssertionError"),
        ("def double(number):\n    return 2 *", "SyntaxError"),
        ("I cannot.", "SyntaxError"),
        ("def double(number):\n    return 4\nraise SystemExit(0)", "the program ended before its tests did"),
        ("import os\ndef double(number):\n    os._exit(0)", "the program ended before its tests did"),
        ("def double(number):\n    return open('/etc/passwd').read()", "No such file"),
    ],
)
async def test_code_that_is_wrong_or_leaves_early_earns_nothing(text: str, reason: str):
    outcome = await grade(text)
    assert outcome.value == 0.0 and reason in outcome.reason


@needs_bwrap
async def test_replies_are_tested_beside_each_other_without_mixing():
    rules = [RULE.model_copy(update={"tests": f"assert double({n}) == {2 * n + n % 2}\n"}) for n in range(6)]
    outcomes = await asyncio.gather(*(grade("    return 2 * number\n", rule) for rule in rules))
    assert [outcome.value for outcome in outcomes] == [1.0, 0.0] * 3


def test_without_a_sandbox_a_row_with_unit_tests_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    with pytest.raises(ValueError, match="the grader 'unit_tests' needs bubblewrap, and no 'bwrap' is on the PATH"):
        RULE.check([], GradingResources(), has_database=False)


async def test_a_broken_sandbox_blames_no_reply(monkeypatch: pytest.MonkeyPatch):
    broken = ["/bin/sh", "-c", "echo 'bwrap: setting up uid map: Permission denied'; exit 1"]
    monkeypatch.setattr("runtime.environments.graders.code.find_bwrap", lambda: "bwrap")
    monkeypatch.setattr("runtime.environments.graders.code.sandboxed_python", lambda *_: broken)
    with pytest.raises(ToolRefused, match=r"cannot run here, bubblewrap says .*Permission denied"):
        await grade("    return 2 * number\n")
