"""Learns from what memory kept, and never answers."""
