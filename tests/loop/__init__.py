"""Whole cycles: from episodes to a promoted policy."""
