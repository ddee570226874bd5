"""What happens to the engine and its adapters: stuck, starved, broken streams, bad files, swaps under load."""
