"""Turns rows into adapters, each in a child process: a spec file in, an adapter directory out."""
