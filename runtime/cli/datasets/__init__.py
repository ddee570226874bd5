"""The commands about training data: import, export, examples."""
