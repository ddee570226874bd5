"""Trains an adapter on preferences between continuations: `python -m optimizer.training.search spec.json`.

The rows are preferences and so is the loss: this is DPO's trainer under the name of the method.
"""

from __future__ import annotations

from optimizer.training import dpo

if __name__ == "__main__":
    dpo.main("search")
