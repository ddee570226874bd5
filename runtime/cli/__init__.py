"""The command line: the server's process, the commands that talk to a running server, and their output."""
