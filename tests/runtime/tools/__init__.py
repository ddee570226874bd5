"""Tests of the runtime: a scripted engine, a game of levers, real SQLite; the real engine where marked."""
