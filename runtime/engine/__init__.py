"""The vLLM server process, the client that talks to it, and what differs between model families."""
