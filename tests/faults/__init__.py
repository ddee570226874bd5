"""Fault injection: the failures of production, one file for each family; full counts are marked slow."""
