"""A stronger model behind an endpoint plays practice tasks; its successes become demonstrations."""
