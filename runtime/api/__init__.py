"""HTTP in, HTTP out: one file per noun; `app.py` puts them together, `errors.py` speaks of what went wrong."""
