"""A learning cycle: its stages, the release gate and the report."""
