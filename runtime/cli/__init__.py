"""What people type and see: the verbs that talk to a running server, and how their answers look in a terminal."""
