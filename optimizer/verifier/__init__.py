"""A verifier: a model trained on graded episodes that says how likely an episode that nobody graded is a success."""
