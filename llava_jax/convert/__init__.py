"""Imports weights from transformers and the original LLaVA, and exports to them.

To read, in this order: import_weights.py, import_hf.py, layouts.py, names.py, export.py.
"""
