"""Graders: rules that turn a reply to a task into a reward, one module each family."""
