"""Answers requests with a model: in batches (`generate`) and for many clients at a time (`engine`).

Read requests.py, prompts.py, generate.py and decoding.py first; then programs.py, batch.py and engine.py.
"""
