"""Renders the results of a run as the table of docs/clients.md. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CHECKS = ("chat", "stream", "tools", "forced tool", "structured", "agent", "responses", "embeddings")
BEGIN, END = "<!-- make clients: begin -->", "<!-- make clients: end -->"
OUTCOMES = {"passed": "yes", "failed": "fails", "model": "model"}


@dataclass(frozen=True)
class Cell:
    """The result of one check of one client with one model."""

    model: str
    client: str
    version: str
    check: str
    outcome: str
    """`passed`, `failed`, or `model`: the server did its part, and the model did not."""
    reason: str
    date: str


def render(cells: Sequence[Cell]) -> str:
    """Return a table for each model, and below it every cell that did not pass, with its reason."""
    parts = []
    for model in dict.fromkeys(cell.model for cell in cells):
        of_model = [cell for cell in cells if cell.model == model]
        parts.append(_render_model(model, of_model))
    return "\n\n".join(parts)


def _render_model(model: str, cells: Sequence[Cell]) -> str:
    checks = [check for check in CHECKS if any(cell.check == check for cell in cells)]
    checks += sorted({cell.check for cell in cells} - set(checks))
    lines = [f"| with {model} | version | {' | '.join(checks)} | run |", "|---" * (len(checks) + 3) + "|"]
    notes = []
    for client in dict.fromkeys(cell.client for cell in cells):
        by_check = {cell.check: cell for cell in cells if cell.client == client}
        words = []
        for check in checks:
            cell = by_check.get(check)
            if cell is None:
                words.append("")
            elif cell.outcome == "passed":
                words.append(OUTCOMES["passed"])
            else:
                notes.append(f"{len(notes) + 1}. {client}, {check}: {_one_line(cell.reason)}")
                words.append(f"{OUTCOMES[cell.outcome]} ({len(notes)})")
        first = next(iter(by_check.values()))
        lines.append(f"| {client} | {first.version} | {' | '.join(words)} | {first.date} |")
    return "\n".join(lines + (["", *notes] if notes else []))


def _one_line(reason: str) -> str:
    return " ".join(reason.split()).replace("|", "\\|").replace("<", "&lt;")


def replace_table(page: str, table: str) -> str:
    """Return the page with the text between its two markers replaced.

    Raises:
        ValueError: the page lacks the markers.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must hold {BEGIN!r} and {END!r} once each, in this order")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
