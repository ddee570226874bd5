"""The tests: `memory`, `runtime` and `optimizer` have one file for each module of the source; the other folders say."""
