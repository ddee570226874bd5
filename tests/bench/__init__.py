"""Benchmarks: one command each, `python -m tests.bench.NAME`; ours, the peer and the floor in one run."""
