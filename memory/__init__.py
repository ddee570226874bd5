"""Keeps and finds: what was lived, what was learned from it, who acts now. It never asks a model to write."""
