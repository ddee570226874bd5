"""Machines of tasks: a sandbox with files, users and a shell of its own, for one episode."""
