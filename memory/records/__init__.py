"""The records: one module for each kind of row, with the operations on it."""
