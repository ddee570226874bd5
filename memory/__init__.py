"""Stores and finds trajectories, insights, documents and policies. It never asks a model to generate text."""
