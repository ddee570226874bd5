"""Candidate against incumbent on held-out tasks: plays, statistics, thresholds."""
