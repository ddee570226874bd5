"""The routes of the project's own resources, one module each."""
