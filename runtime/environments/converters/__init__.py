"""Converters of published benchmarks into task files."""
