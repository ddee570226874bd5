"""Tests of the teacher: a scripted endpoint over real HTTP, a game of levers."""
