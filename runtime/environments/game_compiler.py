"""Compile games as they are asked for, in a process of its own: `python -m runtime.environments.game_compiler`.

A line on standard input is `{"seed", "game_file"}`; a line on standard output says that the file is there. Whatever
goes wrong ends the process, with its trace on standard error.

The process leads a group of its own, and the compilers that TextWorld starts are in it. The end of standard input ends
the whole group: a parent that was killed cannot leave a compiler behind. (The kernel's PR_SET_PDEATHSIG would end this
process alone, and leave what TextWorld started.)
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
"""Answering comes first: a game that is compiled a little later is no harm."""


def end_with_parent(orders: queue.Queue[str]) -> None:
    """Hand on the orders; kill this process and all that it started when nobody can give any more."""
    for line in sys.stdin:
        orders.put(line)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    if os.getpgrp() != os.getpid():
        sys.exit("this process kills its group at the end: start it in a session of its own")
    os.nice(NICENESS)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # TextWorld prints to standard output
    orders: queue.Queue[str] = queue.Queue()
    threading.Thread(target=end_with_parent, args=(orders,), daemon=True).start()

    from runtime.environments.textworld import compile_cooking_game  # seconds, in which the parent may die

    while True:
        order = json.loads(orders.get())
        compile_cooking_game(order["seed"], Path(order["game_file"]))
        print("compiled", file=answers, flush=True)


if __name__ == "__main__":
    main()
