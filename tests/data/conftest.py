"""Fixtures of several files of this folder."""

from built_sets import built, data  # noqa: F401
