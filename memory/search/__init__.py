"""Search over the rows: vectors and text, kept in step with the database, and what of it a prompt is shown."""
