"""An hour at a steady rate: the server's memory, open files and latency do not grow."""

from __future__ import annotations

import os

import pytest
import uvloop

from tests.bench.soak import server, soak, summarise

MINUTES = float(os.environ.get("SOAK_MINUTES", "60"))
PER_SECOND = 20.0  # a fifth of the capacity of two cores, so that other load does not decide the result
MAX_MB_PER_MINUTE = 1.0
MAX_P99_DRIFT = 1.1


@pytest.mark.slow
def test_an_hour_at_a_steady_rate_leaves_memory_files_and_latency_where_they_were():
    with server() as process:
        windows = uvloop.run(soak(process, per_second=PER_SECOND, seconds=MINUTES * 60))
    found = summarise(windows)
    print(found)
    early, late = found["median_p99_ms"]
    assert found["errors"] == 0
    assert found["rss_mb_per_minute"] < MAX_MB_PER_MINUTE
    assert found["files_grown"] <= 8
    assert late <= MAX_P99_DRIFT * early
