"""Search over the rows: the text index, the vector index, their synchronisation, and the memory segment."""
