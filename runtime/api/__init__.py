"""The HTTP API: one module per resource; `app.py` composes them, `errors.py` maps exceptions to answers."""
