"""Recipes that ship with the package, found by name: `--config=finetune:13b`.

Read `common.py` first (every option of a run, with its meaning), then `finetune.py` and `pretrain.py`. A recipe of your
own is a file with a function `get_config` that starts from `common.get_config()`: `--config=path/to/mine.py`.
"""

import os
from pathlib import Path

from llava_jax.cli import UserError

NAMES = ("pretrain", "finetune", "scienceqa", "common")


def find(recipe: str) -> str:
    """The file of a recipe, with its argument: `finetune:7b` -> `.../llava_jax/recipes/finetune.py:7b`.

    A path stays as it is. Raises UserError for a name that the package does not have.
    """
    name, colon, argument = recipe.partition(":")
    if name in NAMES:
        return f"{Path(__file__).with_name(name)}.py{colon}{argument}"
    if name.endswith(".py") or os.path.isfile(name):
        return recipe
    raise UserError(
        f"--config={recipe}: no recipe {name!r}; the package has {', '.join(NAMES)}, "
        "and the path of a recipe of your own ends with .py"
    )
