"""Has a running server turn the loop once, and watches it, stage by stage, to its report.

Refuses to know what a stage does. Leaving does no harm: the cycle goes on, and can be watched again by its id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from runtime.cli.client import Client, Refused
from runtime.cli.output import Failure

POLL_SECONDS = 1.0

OnCycle = Callable[[dict[str, Any]], None]
"""Called with the cycle each time it was looked at."""


class CycleFailed(Exception):
    """The cycle ended with an error. `cycle` is its last state."""

    def __init__(self, cycle: dict[str, Any]) -> None:
        super().__init__(f"cycle {cycle['id']} ended with an error: {cycle['error']}")
        self.cycle = cycle


async def check_cycle(client: Client, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a cycle would need. Raises: Refused for settings that cannot be, NoServer."""
    return await client.post("/v1/cycles/check", {"settings": settings}, is_repeatable=True)


def require_ready(needs: dict[str, Any]) -> None:
    """Raise Failure if something is missing without which the cycle cannot train. An engine that does not answer is
    left out: starting the cycle waits for it."""
    required = [need for need in needs["data"] if need["is_required"] and need["name"] != "engine"]
    missing = [need for need in required if need["num_missing"]]
    if missing:
        reasons = "; ".join(
            f"{need['num_missing']} {need['name']} are missing ({need['detail']}): {need['mend']}" for need in missing
        )
        raise Failure(f"nothing was played, because the cycle could not train: {reasons}", needs=needs["data"])


async def start_cycle(client: Client, settings: dict[str, Any]) -> str:
    """Start a cycle and return its id. Raises: Refused (one runs already, settings that cannot be), NoServer."""
    return (await client.post("/v1/cycles", {"settings": settings}))["id"]


async def watch_cycle(client: Client, cycle_id: str, on_cycle: OnCycle) -> dict[str, Any]:
    """Watch a cycle to its end and return what it came to.

    Raises:
        CycleFailed, Refused, NoServer.
    """
    while True:
        cycle = await client.get(f"/v1/cycles/{cycle_id}")
        on_cycle(cycle)
        if cycle["status"] == "error":
            raise CycleFailed(cycle)
        if cycle["status"] == "completed":
            return await read_outcome(client, cycle)
        await asyncio.sleep(POLL_SECONDS)


async def read_outcome(client: Client, cycle: dict[str, Any]) -> dict[str, Any]:
    """Return the outcome of a completed cycle: the verdict, the policy it was about, and the report."""
    try:
        report, markdown = await read_report(client, cycle["id"])
    except Refused:  # a cycle may end before there is anything to compare
        report = markdown = None
    verdict = cycle["verdict"] or {}
    policies = await client.get("/v1/policies")
    candidate = cycle["artifacts"].get("candidate")
    return {
        "cycle": cycle["id"],
        "verdict": verdict.get("decision"),
        "reason": verdict.get("reason"),
        "policy": None if candidate is None else f"v{candidate}",
        "active": policies["active"],
        "report": report,
        "markdown": markdown,
    }


async def judge(client: Client, version: str) -> dict[str, Any]:
    """Have a candidate judged by what clients played, and return what it came to. Raises: Refused, NoServer."""
    said = await client.post(f"/v1/policies/{version}/judge")
    report, markdown = await read_report(client, said["cycle"])
    as_they_are = {name: said[name] for name in ("cycle", "reason", "policy", "active")}
    return {**as_they_are, "verdict": said["decision"], "report": report, "markdown": markdown}


async def newest_report(client: Client) -> str | None:
    """Return the id of the newest cycle that has a report. Raises: Refused, NoServer."""
    listed = await client.get("/v1/cycles", limit=500)
    return next((cycle["id"] for cycle in listed["data"] if cycle["report_url"] is not None), None)


async def read_report(client: Client, cycle_id: str) -> tuple[dict[str, Any], str]:
    """Return the report of a cycle, as figures and as a page to read. Raises: Refused, NoServer."""
    path = f"/v1/cycles/{cycle_id}/report"
    return await client.get(path), await client.get_text(path, format="markdown")


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Return `{"evaluation": {"num_tasks": 50}}` for `{"evaluation.num_tasks": 50}`, without what is None."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        if value is None:
            continue
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return nested
