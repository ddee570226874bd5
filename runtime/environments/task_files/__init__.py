"""Task files: an environment made of a JSONL file, one task a line, each with its grader."""
