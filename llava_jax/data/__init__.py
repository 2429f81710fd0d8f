"""Data: from files of samples and images to the batches of a run.

Read in this order: `sources` (samples of a file), `samples` (a sample of a JSON value), `tokenization` (token ids and
labels), `plan` (which samples are in the rows of a step), `pipeline` (batches).
"""
