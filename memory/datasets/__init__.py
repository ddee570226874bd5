"""Training data in and out: imported examples, and everything that can be exported."""
