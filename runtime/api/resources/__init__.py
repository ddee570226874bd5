"""The project's own resources over HTTP, one module each."""
