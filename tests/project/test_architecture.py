"""Enforces the architecture: imports, homes of heavy packages, widths of folders, sizes, and the glossary's words."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("memory", "runtime", "optimizer", "serve")
MAY_IMPORT = {
    "memory": set(),
    "runtime": {"memory"},
    "optimizer": {"memory"},
    "serve": {"memory", "runtime", "optimizer"},
}
# Where a heavy package may be imported: a file, or a directory. vllm is a process, never an import.
HOMES = {
    "chromadb": ("memory/search/vector_index.py",),
    "psycopg": ("memory/storage/postgresql.py",),
    "sentence_transformers": ("memory/search/encoder.py",),
    "trl": ("optimizer/training/",),
    "peft": ("optimizer/training/",),
    "vllm": (
        "runtime/engine/cpu_workarounds/worker.py",
        "runtime/engine/cpu_workarounds/idle_wait.py",
        "runtime/engine/tool_call_grammar.py",
    ),
    "langgraph": (
        "runtime/agent/graph.py",
        "runtime/agent/nodes.py",
        "runtime/agent/state.py",
    ),
    "textworld": ("runtime/environments/",),
    "scienceworld": ("runtime/environments/science_world.py",),
    "mcp": ("runtime/tools/mcp.py",),
    "prometheus_client": ("runtime/observability/telemetry.py", "runtime/api/metrics.py"),
    "opentelemetry": ("runtime/observability/tracing.py",),
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Yield (path from the root, syntax tree) of every source file but the tests."""
    for room in ROOMS:
        for path in [ROOT / f"{room}.py", *sorted((ROOT / room).rglob("*.py"))]:
            if path.is_file():
                yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


SOURCES = dict(sources())
MODULES = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in SOURCES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of everything imported; for `from a import b`, `a.b`, of which `a` may be the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_load(tree: ast.Module) -> Iterator[str]:
    """Yield the imports at load time, without those inside functions or under TYPE_CHECKING."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from imports(node)


def module_of(name: str) -> str | None:
    """Return the project's module that an imported name is or belongs to."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


@pytest.mark.parametrize("path", SOURCES)
def test_no_import_leads_upward(path: str):
    room = path.split("/")[0].removesuffix(".py")
    met = {name.split(".")[0] for name in imports(SOURCES[path])} & set(ROOMS)
    assert met <= MAY_IMPORT[room] | {room}


@pytest.mark.parametrize("path", SOURCES)
def test_each_heavy_package_has_one_home(path: str):
    met = {name.split(".")[0] for name in imports(SOURCES[path])} & set(HOMES)
    strays = {package for package in met if not path.startswith(HOMES[package] or ("nowhere",))}
    assert not strays


@pytest.mark.parametrize("path", [path for path in SOURCES if path.endswith("__init__.py")])
def test_an_init_file_is_a_docstring_and_nothing_else(path: str):
    assert ast.get_docstring(SOURCES[path]) and len(SOURCES[path].body) == 1


def drop_leaves(needs: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return what is left when names without remaining needs are dropped again and again: the circles, and what needs
    them."""
    while leaves := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in leaves}
    return needs


CIRCLES_OF_TYPES = {
    # the parts of a composed grader are any grader, itself included: the registry completes its types
    ("runtime.environments.graders.composed", "runtime.environments.graders.registry"),
}
"""(module, what it imports for its types alone): with any other import inside a function or under TYPE_CHECKING there
would be no circle."""


@pytest.mark.parametrize("read", [imports_at_load, imports])
def test_no_imports_go_in_a_circle(read: Callable[[ast.Module], Iterator[str]]):
    needs = {
        module: {it for name in read(SOURCES[path]) if (it := module_of(name)) and it != module}
        for module, path in MODULES.items()
    }
    if read is imports:
        for module, other in CIRCLES_OF_TYPES:
            needs[module].remove(other)
    circles = drop_leaves(needs)
    assert not circles, f"these modules import each other in a circle: {sorted(circles)}"


MAX_MODULES = 14
FOLDERS = sorted({path.rpartition("/")[0] for path in SOURCES if "/" in path and "/versions/" not in path})


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_folder_is_wider_than_a_reader_can_hold(folder: str):
    modules = [path for path in SOURCES if path.rpartition("/")[0] == folder and not path.endswith("__init__.py")]
    assert len(modules) <= MAX_MODULES, f"{folder} has {len(modules)} modules: find the folder that is missing"


@pytest.mark.parametrize("parent", FOLDERS)
def test_folders_beside_each_other_import_one_way(parent: str):
    """Modules directly in the parent are left out: they may use all its folders, or be used by them."""
    needs: dict[str, set[str]] = {}
    for path in MODULES.values():
        own = folder_in(parent, path)
        if own is not None:
            others = {folder_in(parent, MODULES[it]) for name in imports(SOURCES[path]) if (it := module_of(name))}
            needs.setdefault(own, set()).update(others - {own, None})
    circles = drop_leaves(needs)
    assert not circles, f"these folders import each other in a circle: {sorted(circles)}"


def folder_in(parent: str, path: str) -> str | None:
    """Return the folder directly below `parent` that holds `path`; None where there is none."""
    below = path.removeprefix(f"{parent}/")
    return below.partition("/")[0] if below != path and "/" in below else None


MAX_LINES_OF_SERVE = 300
MAX_LINES_OF_FUNCTION = 69
MAX_SHARE_OF_ANY = 0.005
MAX_CODE_LINES_PER_COMMENT = 25


def functions(path: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (it for it in ast.walk(SOURCES[path]) if isinstance(it, ast.FunctionDef | ast.AsyncFunctionDef))


def count_lines(path: str) -> tuple[int, int]:
    """Return (lines with code, lines with a comment) of a file; docstrings are neither."""
    text = (ROOT / path).read_text(encoding="utf-8")
    code, comments = set[int](), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.string.strip():
            code.update(range(token.start[0], token.end[0] + 1))
    texts = [it for it in ast.walk(SOURCES[path]) if isinstance(it, ast.Expr) and isinstance(it.value, ast.Constant)]
    docstrings = {line for it in texts for line in range(it.lineno, (it.end_lineno or it.lineno) + 1)}
    return len(code - docstrings), len(comments)


def test_serve_and_every_function_are_short_enough_to_read():
    lines = (ROOT / "serve.py").read_text(encoding="utf-8").count("\n")
    lengths = {
        f"{path}:{it.lineno} {it.name}": (it.end_lineno or it.lineno) - it.lineno + 1
        for path in SOURCES
        if "/versions/" not in path
        for it in functions(path)
    }
    longer = {name: length for name, length in lengths.items() if length > MAX_LINES_OF_FUNCTION}
    assert lines <= MAX_LINES_OF_SERVE and not longer, f"serve.py has {lines} lines; longer functions: {longer}"


def test_hardly_any_parameter_is_bare_any():
    """Those behind `*` and `**` are left out: they are handed on."""
    parameters = [
        (f"{path}:{it.lineno} {it.name}({argument.arg})", argument.annotation)
        for path in SOURCES
        for it in functions(path)
        for argument in (*it.args.posonlyargs, *it.args.args, *it.args.kwonlyargs)
        if argument.arg not in ("self", "cls")
    ]
    bare = [
        name
        for name, annotation in parameters
        if annotation is None or (isinstance(annotation, ast.Name) and annotation.id == "Any")
    ]
    share = len(bare) / len(parameters)
    assert share < MAX_SHARE_OF_ANY, f"{len(bare)} of {len(parameters)} parameters ({share:.2%}) are Any: {bare}"


def test_the_code_is_commented_where_it_warns():
    counted = [count_lines(path) for path in SOURCES]
    code, comments = sum(lines for lines, _ in counted), sum(lines for _, lines in counted)
    ratio = code / comments
    assert ratio <= MAX_CODE_LINES_PER_COMMENT, f"{code} lines of code for {comments} with comments: {ratio:.1f}"


def banned_names() -> dict[str, str]:
    """Return each name that the glossary bans, with its replacement."""
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").partition("## Names not used")[2]
    rows = [row.strip("| \n").split(" | ") for row in text.splitlines() if row.startswith("| `")]
    return {name: better for names, better in rows for name in re.findall(r"`(\w+)`", names)}


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names that a module defines: of classes, functions, arguments and variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def split_name(name: str) -> list[str]:
    """Return the words of a name, in small letters."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)]


def holds_banned(name: str, banned: str) -> bool:
    """Return whether a name is the banned one or has it as a part. One with a capital is only that very name."""
    if not banned.islower():
        return name.strip("_") == banned
    words, wanted = split_name(name), split_name(banned)
    return any(words[start : start + len(wanted)] == wanted for start in range(len(words)))


@pytest.mark.parametrize(
    ("name", "banned", "is_met"),
    [
        ("_told", "told", True),
        ("TOLD_EVENTS", "told", True),
        ("last_told_at", "told", True),
        ("untold", "told", False),
        ("ToldEvents", "told", True),
        ("must_give_up", "give_up", True),
        ("_Actor", "Actor", True),
        ("is_actor", "Actor", False),
    ],
)
def test_a_banned_name_is_met_in_any_case_and_as_a_part(name: str, banned: str, is_met: bool):
    assert holds_banned(name, banned) is is_met


@pytest.mark.parametrize("path", [path for path in SOURCES if "/versions/" not in path])
def test_names_are_the_glossarys(path: str):
    banned = banned_names()
    assert len(banned) > 20
    names = {*defined_names(SOURCES[path]), path.rpartition("/")[2].removesuffix(".py")}
    met = {name: better for name in names for each, better in banned.items() if holds_banned(name, each)}
    assert not met, f"better names stand in docs/glossary.md: {met}"
