"""The quality of a verifier: its figures on tasks that it has not seen, and the same in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimizer.verifier.calibration import Calibration, auc_interval, measure_auc, measure_brier, share_interval
from optimizer.verifier.rows import VerifierExample

HOME = "verifiers"
"""Their folder in the data directory."""


def measure(
    test: Sequence[VerifierExample],
    margins: Sequence[float],
    base_margins: Sequence[float],
    calibration: Calibration,
    seed: int,
) -> dict[str, Any]:
    """Return the figures of a verifier on tasks that neither its weights nor its threshold have seen."""
    labels, tasks = [each.is_success for each in test], [each.task for each in test]
    is_right = [bool(it) is label for it, label in zip(calibration.decide(margins).tolist(), labels, strict=True)]
    by_people = [position for position, each in enumerate(test) if each.is_by_person]
    return {
        "auc": measure_auc(margins, labels),
        "auc_interval": auc_interval(margins, labels, tasks, seed),
        "base_auc": measure_auc(base_margins, labels),
        "brier": measure_brier(calibration.probabilities(margins), labels),
        "agreement": _describe_share(is_right, tasks, seed),
        "agreement_with_people": _describe_share(
            [is_right[it] for it in by_people], [tasks[it] for it in by_people], seed
        )
        if by_people
        else None,
    }


def describe(report: dict[str, Any]) -> str:
    """Return a verifier's report in words."""
    low, high = report["auc_interval"]
    test, people = report["parts"]["test"], report["agreement_with_people"]
    lines = [
        f"Verifier v{report['version']} of {report['base_model']}, on {test['num_episodes']} episodes of "
        f"{test['num_tasks']} tasks that it was neither trained nor calibrated on:",
        f"AUC {report['auc']:.2f} (95 % interval {low:.2f} to {high:.2f}), of the untrained base "
        f"{report['base_auc']:.2f}; Brier score {report['brier']:.2f} (always saying 0.5: 0.25).",
        f"At the threshold {report['calibration']['threshold']:.2f}, chosen on the rewards of "
        f"{'people' if report.get('calibrated_on') == 'people' else 'all sources'}, it agrees with "
        f"{_say_share(report['agreement'])}.",
        "Nobody labelled an episode of these tasks by hand, so its agreement with people is unknown."
        if people is None
        else f"With the labels of people it agrees in {_say_share(people)}.",
        "Its grades count for training data alone, where nobody else gave a reward; the release gate never sees them.",
    ]
    return "\n".join(lines)


def find_newest(home: Path) -> int:
    """Return the number of the newest verifier in a directory of verifiers that was measured; 0 if there is none."""
    return max((int(path.parent.name[1:]) for path in home.glob("v*/report.json")), default=0)


def read_newest(home: Path) -> dict[str, Any] | None:
    """Return the report of the newest verifier; None if there is none."""
    version = find_newest(home)
    return json.loads((home / f"v{version}" / "report.json").read_text(encoding="utf-8")) if version else None


def describe_part(part: Sequence[VerifierExample]) -> dict[str, int]:
    """Return the sizes of one part of the examples."""
    return {
        "num_episodes": len(part),
        "num_tasks": len({each.task for each in part}),
        "num_good": sum(each.is_success for each in part),
        "num_by_people": sum(each.is_by_person for each in part),
    }


def _describe_share(is_right: Sequence[bool], tasks: Sequence[object], seed: int) -> dict[str, Any]:
    low, high = share_interval(is_right, tasks, seed)
    return {"num_right": sum(is_right), "num_episodes": len(is_right), "low": low, "high": high}


def _say_share(share: dict[str, Any]) -> str:
    num_right, num_episodes = share["num_right"], share["num_episodes"]
    return (
        f"{num_right} of {num_episodes} rewards ({num_right / num_episodes:.0%}, 95 % interval {share['low']:.0%} to "
        f"{share['high']:.0%})"
    )
