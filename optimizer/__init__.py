"""Learns from the stored episodes; never answers requests."""
