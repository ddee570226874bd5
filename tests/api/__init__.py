"""The HTTP application, asked over a real socket by the official client and by plain HTTP."""
