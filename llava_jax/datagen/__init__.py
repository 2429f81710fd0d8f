"""Makes and filters instruction data: from captions and boxes, by a language model behind an API or by rules.

Read `generate.py` first, the command that asks a model; then `recipe.py`, which decides what to ask and what to accept;
`asking.py`, which sends the requests; `outputs.py`; and `report.py`.
"""
