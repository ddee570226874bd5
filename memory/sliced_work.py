"""Work that stops now and then, so that an event loop can run other tasks in between.

A thread would not do for work on long texts: `re` holds the interpreter's lock, and long tasks would fill the pool.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

SlicedWork = Generator[None, None, T]
"""Yields after every piece of work, which must be short, and returns the result."""
SLICE_SECONDS = 0.001
"""The event loop runs other tasks as soon as a piece ends later than this."""


def run(work: SlicedWork[T]) -> T:
    """Do the whole work at once and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


async def run_in_slices(work: SlicedWork[T]) -> T:
    """Do the work on the event loop, in slices between which other tasks run, and return its result."""
    started = time.monotonic()
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
        if time.monotonic() - started > SLICE_SECONDS:
            await asyncio.sleep(0)
            started = time.monotonic()
