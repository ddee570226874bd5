"""`python -m tests.bench.proof`; the package says what it does."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict

from tests.bench.proof import __doc__ as about
from tests.bench.proof.page import Result, plot, render
from tests.bench.proof.plan import list_runs
from tests.bench.proof.play import play
from tests.bench.server import ROOT, end_in_order

DOCS = ROOT / "docs"
RESULTS = DOCS / "proof"


def write_page() -> None:
    """Write docs/proof.md, and the plot beside the results."""
    results: dict[str, list[Result]] = defaultdict(list)
    for path in sorted(RESULTS.glob("*.json")):
        subject, result = Result.read(path)
        results[subject].append(result)
    page = render(results)
    if results:
        plot(results, RESULTS / "success.png")
        page += "\n![Held-out tasks won, by method](proof/success.png)\n"
    (DOCS / "proof.md").write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the run of this name, or all whose name begins like this")
    parser.add_argument("--most", type=int, help="stop after so many runs")
    parser.add_argument("--list", action="store_true", help="list the runs and what is finished")
    parser.add_argument("--page", action="store_true", help="write the page from the results there are")
    given = parser.parse_args()
    end_in_order()
    runs = [run for run in list_runs() if run.name.startswith(given.only or "")]
    todo = [run for run in runs if not (RESULTS / f"{run.name}.json").exists()]
    if given.list:
        print("\n".join(f"{'open' if run in todo else 'done'}  {run.name}" for run in runs))
        return
    for run in [] if given.page else todo[: given.most]:
        print(f"{run.name} ...", flush=True)
        result = play(run)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{run.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{run.name}: {result['verdict']['verdict']}, {result['minutes']} minutes", flush=True)
        write_page()
    write_page()


if __name__ == "__main__":
    main()
