"""Many requests to a language model behind an OpenAI-compatible API, none of them paid twice.

Read `client.py` first, which composes the layers of a request; then `retry.py`, `rate_limit.py` and `budget.py`, the
layers; `ledger.py`, the record of all requests; and `asking.py`, which asks until every task has its answer.
"""
