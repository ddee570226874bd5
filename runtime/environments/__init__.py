"""Environments: tasks that can be played again, with tools to act on them and a reward at the end."""
