"""Anthropic's Messages API: its requests become chat requests, and turns become its messages."""
