"""Routes that take in and give out training data, as streams of rows."""
