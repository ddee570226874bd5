"""What must hold, checked: one file for each module of the source."""
