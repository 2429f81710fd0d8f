"""Checkpoints on disk. To read, in this order: format.py, reading.py, writing.py, training.py."""
