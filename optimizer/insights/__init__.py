"""Insights from successes and failures, written by a critic or found by counting."""
