"""Serving of policies: leases, hot swap, and maintenance windows of the engine."""
