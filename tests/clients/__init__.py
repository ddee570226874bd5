"""Common clients, each in its own environment, against a server of this project (`make clients`)."""
