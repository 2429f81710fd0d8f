"""The model: a vision tower, a projector and a decoder.

To read, in this order: config.py, llava.py, towers/clip.py, projectors/mlp.py, llama.py. What can be registered from
outside is described in docs/extending.md.
"""
