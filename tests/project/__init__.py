"""The project itself: its architecture, documentation, Makefile and continuous integration."""
