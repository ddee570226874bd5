"""The compiler process of `compilers.py`: `python -m runtime.environments.game_compiler`.

Each line on standard input is a job, `{"seed", "game_file"}`; each line on standard output confirms a compiled file.
Any error ends the process with its traceback on standard error.

Invariant: the process leads its own process group, which includes the compilers that TextWorld starts, and kills the
group at the end of standard input. A killed parent therefore leaves no compiler behind. (The kernel's PR_SET_PDEATHSIG
would end this process alone.)
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path

NICENESS = 10
"""Lower priority than the server's: requests are more urgent than compiling."""


def read_jobs(jobs: queue.Queue[str]) -> None:
    """Put each line of standard input into `jobs`; kill the whole process group at its end."""
    for line in sys.stdin:
        jobs.put(line)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    if os.getpgrp() != os.getpid():
        sys.exit("this process kills its group at the end: start it in a session of its own")
    os.nice(NICENESS)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # TextWorld prints to standard output, which carries the confirmations
    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=read_jobs, args=(jobs,), daemon=True).start()

    # After the thread has started: this import takes seconds, in which the parent may die.
    from runtime.environments.textworld import compile_cooking_game

    while True:
        job = json.loads(jobs.get())
        compile_cooking_game(job["seed"], Path(job["game_file"]))
        print("compiled", file=answers, flush=True)


if __name__ == "__main__":
    main()
