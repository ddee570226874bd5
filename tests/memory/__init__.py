"""Tests of memory. SQLite and Chroma are always real, in a temporary directory; only the encoder is a fake."""
