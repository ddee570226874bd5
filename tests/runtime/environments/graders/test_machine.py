"""Checks of tasks with a machine: comparisons here, scripts in the machine."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from runtime.environments.base import Outcome
from runtime.environments.graders.base import GradingResources, Submission
from runtime.environments.graders.machine import COMPARISONS, Checks
from runtime.environments.machines.machine import Machine, MachineSpec
from tests.support.machines import needs_machine

CHECKS = TypeAdapter(Checks)


def make(*checks: Any) -> Checks:
    return CHECKS.validate_python({"type": "checks", "checks": [*checks]})


def run(code: str, language: str = "bash") -> dict[str, Any]:
    return {"run": {"code": code, "language": language}}


@pytest.mark.parametrize(
    ("comparison", "accepted", "refused"),
    [
        (
            "integer",
            [("3", "3\n"), (" 03 ", "3"), ("-1", "-1"), ("1_0", "10")],
            [
                ("", "3"),
                ("3.0", "3"),
                ("three", "3"),
                ("3", ""),
                ("", ""),
                ("3", "4"),
                ("None", "3"),
                ("9" * 5000, "3"),
            ],
        ),
        (
            "string",
            [("a\r\nb", "a\nb\n"), (" yes", "yes\n"), ("", "\n")],
            [("Yes", "yes"), ("a b", "a  b"), ("None", ""), ("", "x")],
        ),
        (
            "size",
            [("4K", "4K\n"), ("4096", "4K"), ("4096B", "4K"), ("2Byte", "2"), ("1024K", "1M"), ("1 G", "1024M")],
            [("4KB", "4K"), ("4.0K", "4.0K"), ("1.5M", "1.5M"), ("4k", "4K"), ("", "4K"), ("K", "4K"), ("4MB", "4MB")],
        ),
        ("containing", [("it is /a/b.", "/a/b\n"), ("x", "")], [("/a", "/a/b"), ("", "x")]),
        ("in", [("b", "a\nb\nc"), ("", "x")], [("d", "a\nb\nc")]),
    ],
)
def test_comparisons_are_agentbenchs(comparison: str, accepted: list[Any], refused: list[Any]):
    compare = COMPARISONS[comparison]
    assert [pair for pair in accepted if not compare(*pair)] == []
    assert [pair for pair in refused if compare(*pair)] == []


async def grade(checks: Checks, answer: str, *commands: str) -> Outcome:
    machine = Machine(MachineSpec())
    await machine.start()
    try:
        for command in commands:
            await machine.run_command(command)
        return await checks.grade(Submission(answer, machine=machine), GradingResources())
    finally:
        await machine.close()


@needs_machine
async def test_scripts_get_the_answer_and_the_outputs_before_them():
    checks = make(
        run("[ $# = 1 ] && echo -n one"),
        run("import sys\nassert sys.argv[1:] == ['mine', 'one']\nprint('two')", "python"),
        run('[ "$1|$2|$3" = "mine|one|two\n" ]'),
    )
    assert (await grade(checks, "mine")) == Outcome(1.0, "all checks pass")
    wrong = await grade(checks, "other")
    assert wrong.value == 0.0 and "check 2 ended with status 1 for 'other'" in wrong.reason


@needs_machine
async def test_an_answer_is_compared_with_what_the_task_counts():
    checks = make(run("ls /srv | wc -l"), {"compare": "integer"})
    assert (await grade(checks, "2", "touch /srv/a /srv/b")).value == 1.0
    assert await grade(checks, "1", "touch /srv/a /srv/b") == Outcome(0.0, "expected '2' (integer), not '1'")
    assert (await grade(checks, "")).value == 0.0


@needs_machine
async def test_checks_look_at_what_was_done():
    checks = make(run('[ "$(calc 2)" = 4 ] && test -d /data'))
    done = ("echo 'echo $(($1 * 2))' > /usr/local/bin/calc; chmod +x /usr/local/bin/calc", "mkdir /data")
    assert (await grade(checks, "None", *done)).value == 1.0
    assert (await grade(checks, "None", done[0])).value == 0.0


@needs_machine
async def test_programs_that_a_model_installs_deceive_no_comparison():
    checks = make(run("ls /srv | wc -l"), {"compare": "integer"})
    fakes = [
        f"echo 'echo 7' > /usr/local/bin/{name}; chmod +x /usr/local/bin/{name}" for name in ("ls", "wc", "python3")
    ]
    fakes += ["wc() { echo 7; }; export -f wc", "echo 'wc() { echo 7; }' | tee ~/.bashrc ~/.profile /etc/profile"]
    assert (await grade(checks, "7", *fakes, "hash -r; wc")).value == 0.0


FILL = """
import subprocess, time
try:
    while True:
        subprocess.Popen(["sleep", "100"])
except OSError:  # no more processes
    open("full", "w")
    time.sleep(100)
"""


@needs_machine
async def test_a_machine_that_its_model_broke_earns_nothing():
    checks = make(run("echo 1"), {"compare": "integer"})
    outcome = await grade(
        checks, "1", f"cat > fill.py <<'E'\n{FILL}E", "python3 fill.py & until [ -e full ]; do :; done"
    )
    assert outcome.value == 0.0 and "Resource temporarily unavailable" in outcome.reason


@pytest.mark.parametrize(
    ("checks", "problem"),
    [
        ([], "at least 1 item"),
        ([{"compare": "integer"}], "the first check must run a script"),
        ([run("x"), {"compare": "float"}], "compare"),
        ([run("x", "perl")], "language"),
        ([{"run": {"code": "x", "file": "y"}}], "file"),
    ],
)
def test_checks_that_cannot_be_are_refused(checks: list[Any], problem: str):
    with pytest.raises(ValidationError, match=problem):
        make(*checks)
