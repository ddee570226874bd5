"""The agent: its graph, its nodes, and the episodes that are open."""
