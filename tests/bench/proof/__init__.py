"""What each method of learning is worth, on held-out tasks, over seeds: `make proof` writes docs/proof.md.

    python -m tests.bench.proof [--only bfcl-sft-dpo] [--most 3] [--list] [--page]

Flow: `plan.py` lists the runs -> `play.py` plays each that has no result yet, one whole cycle on a server of its own
-> `page.py` writes the page and the plot from all results. A run takes 20 to 60 minutes; one that is interrupted is
begun again, and what is finished is never repeated.
"""
