"""The vLLM server process, its HTTP client, and the differences between model families."""
