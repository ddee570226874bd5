"""Real small models from the package index, converted to directories that vLLM and transformers read."""
