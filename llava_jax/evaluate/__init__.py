"""Benchmarks: `python -m llava_jax.evaluate` answers their questions, scores or judges answers, and compares runs.

Read in this order: `benchmark.py` (what a benchmark declares), `benchmarks/pope.py` (one of them), `score.py` (answers
joined with labels), `predict.py` with `predict_checkpoint.py` (answers by a model), `judge.py` (answers by a language
model about answers), `report.py` (runs side by side). How toolkits score is in `rules.py`; `benchmarks/options.py` has
three benchmarks with rules.
"""
