"""Tasks that can be played again: each environment gives tools and, at the end, a reward."""
