"""Clients that people have, each in an environment of its own, against a server of this project (`make clients`)."""
