"""Reads and writes rows of training data in the forms that other tools use. Pure functions."""
