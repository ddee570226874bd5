"""Corrections to vLLM on CPUs. Each module names the version it corrects."""
