"""Corrections to vLLM on CPUs. Each module names the version and says when to delete it."""
