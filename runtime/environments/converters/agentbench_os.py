"""The operating-system tasks of AgentBench (arXiv 2308.03688) as tasks with a machine.

The 1,000 published training tasks are practice; the development and the standard tasks are held out, because the paper
reports on both. AgentBench's database tasks have no training set, which is why their development tasks are practice.
Departures: a sandbox instead of a container of Ubuntu, a shorter prompt, the names of the tools, and a reply without a
call is the answer. Tasks that no sandbox of this kind can hold are left out, each with its reason.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from runtime.environments.converters.published import SkippedTask, read_json_list
from runtime.environments.graders.machine import COMPARISONS
from runtime.environments.machines.machine import Script
from runtime.environments.task_files.reader import MAX_PROBLEMS, describe_error

PROMPT = (
    "You work on a Linux machine to answer a question or to do what is asked. Take one step at a time with bash. To "
    "give an answer call answer, with the exact value alone; if no answer is asked for, call finish when it is done."
)
PUBLISHED = ("data/dev.json", "data/[0-9]/*.json", "train_*/*.json")
"""The files of AgentBench's own folder `data/os_interaction`; `data/6-backup.json` is in none of its configurations."""
COPIED = ("os_*.json",)
"""Files of a folder without the published scripts."""
# SHA-256 of the published scripts that compare and look at nothing: they are compared here, where no model reaches.
COMPARING = {
    "1f1fd1b34581794346c577bea54d50c87a547f483e552259cb66563c25f5fed8": "integer",
    "9717a8a15f466f93ef02606257fe3ab3bb0c0ed1d1804783d8d393d16b6ad533": "integer",
    "c0afd9384f5c2e492b5c158731e5fefb000692c4ba6a6be89f168aca7e89faec": "string",
    "b0d6ed977b4802f01725edd90c96f056021a75fe09ebf890a1a3a01dfc934b29": "size",
    "107c1f4a4065702276084876fca4316d3d4de14b24c3e7d89cb7e532e0794c31": "containing",
    "35325fb698f3c8d2009c70466237f2d0a98df20bf8e19558d7677beefa8e54b8": "in",
}
_BY_NAME = {f"{name}.py": name for name in COMPARISONS} | {f"{name}-match.py": name for name in COMPARISONS}
_IMPOSSIBLE = (
    (re.compile(r"\bapt(-get)? +(update|install|remove)\b"), "it installs packages, and a machine has no network"),
    (re.compile(r"\brunuser\b"), "its check reads files as several users, and a machine has one"),
    (
        re.compile(r"\bfind / [^|;]*\Z"),
        "its check must read all files, and some in /usr are the host's administrator's",
    ),
    (re.compile(r"\bch(mod|own)\b[^\n;&|]* /usr/s?bin/"), "it changes a program in /usr/bin, which is the host's"),
)


class PublishedScript(BaseModel, extra="forbid"):
    """A script of a row, its text or the file that has it."""

    language: Literal["bash", "python"] = "bash"
    file: str | None = None
    code: str | None = None

    @model_validator(mode="after")
    def _has_one(self) -> PublishedScript:
        if (self.file is None) == (self.code is None):
            raise ValueError("a script has either a file or code")
        return self


AnyScript = str | PublishedScript


class Create(BaseModel):
    """How the machine is made; its image is always the same one here."""

    init: AnyScript | list[AnyScript] = []


class Evaluation(BaseModel):
    """How an answer is judged."""

    match: str | None = Field(default=None, min_length=1)
    check: AnyScript | list[AnyScript | None] | None = None
    """None in a list stands for the example."""
    example: AnyScript | None = None

    @model_validator(mode="after")
    def _has_one(self) -> Evaluation:
        if (self.match is None) == (not self.check):
            raise ValueError("give either a match or a check")
        if isinstance(self.check, list) and None in self.check and self.example is None:
            raise ValueError("a check stands for the example, and there is none")
        return self


class PublishedRow(BaseModel):
    """A task as it is published; labels, explanations and what else there is are not read."""

    description: str = Field(min_length=1)
    # Two published rows have a list of checks here by mistake; AgentBench's reader passes over it as well.
    create: Create | list[Any] = Create()
    start: str = ""
    evaluation: Evaluation


@dataclass(frozen=True)
class PublishedTask:
    """A task, and the script that its authors solved it with."""

    content: dict[str, Any]
    example: Script | None


class ScriptMissing(Exception):
    """A row names a script that lies in no folder here."""


def read_agentbench_os(source: Path) -> Iterator[dict[str, Any] | SkippedTask]:
    """Yield the tasks of AgentBench's folder `data/os_interaction`, of one of its files, or of copies `os_*.json`.

    Raises:
        ValueError: there is no such file, or rows are not as they are published; each is named by file and line.
    """
    for task in read_published(source):
        yield task if isinstance(task, SkippedTask) else task.content


def read_published(source: Path) -> Iterator[PublishedTask | SkippedTask]:
    """Yield the tasks of `read_agentbench_os` with their examples. Raises: ValueError."""
    problems = list[str]()
    for path in find_files(source):
        for number, (line, row) in enumerate(read_json_list(path)):
            try:
                yield _read_task(_name_file(path) + f"-{number}", path, PublishedRow.model_validate(row))
            except ValidationError as error:
                problems.append(f"{path}:{line}: {describe_error(error)}")
            except ScriptMissing as missing:
                yield SkippedTask(f"{path}:{line}: {missing}")
            except NotImplementedError as impossible:
                yield SkippedTask(f"{path}:{line}: {impossible}")
    if problems:
        more = f"\nand {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        shown = "\n".join(problems[:MAX_PROBLEMS])
        raise ValueError(f"{len(problems)} rows are not as AgentBench publishes them:\n{shown}{more}")


def find_files(source: Path) -> list[Path]:
    """Return the problem files of a folder, or `source` itself. Raises: ValueError if there is none."""
    if source.is_file():
        return [source]
    for patterns in (PUBLISHED, COPIED):
        if files := [path for pattern in patterns for path in sorted(source.glob(pattern))]:
            return files
    raise ValueError(f"{str(source)!r} holds no file {', '.join(map(repr, (*PUBLISHED, *COPIED)))}")


def _name_file(path: Path) -> str:
    """Return the beginning of the names of a file's tasks: `os-dev`, `os-training`, `os-1-stock`."""
    folder = f"{path.parent.name}-" if path.parent.name.isdigit() else ""
    return f"os-{folder}{path.stem.removeprefix('os_')}"


def _find_scripts(path: Path) -> Path:
    """Return the folder that AgentBench's configuration gives a problem file for its scripts."""
    if path.parent.name.isdigit():
        return path.parents[2] / "scripts" / path.parent.name
    if path.parent.name == "data":
        return path.parents[1] / "scripts" / path.stem
    return path.parents[1] / "scripts" / "7" if path.parent.name.startswith("train_") else path.parent / "scripts"


def _read_task(name: str, path: Path, row: PublishedRow) -> PublishedTask:
    """Return the task of a row. Raises: ScriptMissing, NotImplementedError if a machine cannot hold it."""
    scripts = _find_scripts(path)
    create, evaluation = row.create if isinstance(row.create, Create) else Create(), row.evaluation
    setup = [_read_script(it, scripts) for it in (create.init if isinstance(create.init, list) else [create.init])]
    example = _read_script(evaluation.example, scripts) if evaluation.example is not None else None
    grader = _read_grader(evaluation, example, scripts)
    texts = [script.code for script in setup] + [
        check["run"]["code"] for check in grader.get("checks", ()) if "run" in check
    ]
    for pattern, reason in _IMPOSSIBLE:
        if any(pattern.search(text) for text in texts):
            raise NotImplementedError(f"left out, {reason}")
    content = {
        "name": name,
        "split": "practice" if "training" in path.stem else "held-out",
        "kind": "os",
        "messages": [{"role": "system", "content": PROMPT}, {"role": "user", "content": row.description}],
        "machine": {"setup": [script.model_dump() for script in setup], "start": row.start},
        "grader": grader,
    }
    return PublishedTask(content, example)


def _read_grader(evaluation: Evaluation, example: Script | None, scripts: Path) -> dict[str, Any]:
    if evaluation.match is not None:
        return {"type": "exact", "answer": evaluation.match}
    checks = evaluation.check if isinstance(evaluation.check, list) else [evaluation.check]
    return {"type": "checks", "checks": [_read_check(each, example, scripts) for each in checks]}


def _read_check(check: AnyScript | None, example: Script | None, scripts: Path) -> dict[str, Any]:
    if check is None:
        assert example is not None, "checked when the row was read"
        return {"run": example.model_dump()}
    if isinstance(check, PublishedScript) and check.file is not None:
        file = scripts / check.file
        name = COMPARING.get(digest(file)) if file.exists() else _BY_NAME.get(file.name)
        if name is not None:
            return {"compare": name}
    return {"run": _read_script(check, scripts).model_dump()}


def _read_script(script: AnyScript, scripts: Path) -> Script:
    if isinstance(script, str):
        return Script(code=script)
    if script.code is not None:
        return Script(language=script.language, code=script.code)
    file = scripts / str(script.file)
    if not file.is_file():
        raise ScriptMissing(f"left out, its script {str(file)!r} is missing: copy AgentBench's scripts there")
    return Script(language=script.language, code=file.read_text(encoding="utf-8"))


def digest(file: Path) -> str:
    """Return a file's SHA-256, as `COMPARING` has it."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
