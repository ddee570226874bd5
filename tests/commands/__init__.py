"""The command line and its settings, as a person uses them."""
