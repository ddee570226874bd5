"""What production does to a server, done on purpose: one file a family of faults, full counts marked slow."""
