"""Recipes that ship with the package, found by name: `--config=finetune:13b`.

Read `common.py` first (every option of a run, with its meaning), then `finetune.py` and `pretrain.py`. A recipe of your
own is a file with a function `get_config` that starts from `common.get_config()`: `--config=path/to/mine.py`.
"""

import os
import runpy
from pathlib import Path

from ml_collections import ConfigDict

from llava_jax.cli import UserError, expand_home

NAMES = ("pretrain", "finetune", "finetune_lora", "llava_next", "scienceqa", "common")


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


def own_copy(config: ConfigDict | str | os.PathLike) -> ConfigDict:
    """The options of a recipe, or a copy of a ConfigDict, with `~` expanded in paths. Raises UserError for others."""
    if isinstance(config, str | os.PathLike):
        return get_config(config)
    if not isinstance(config, ConfigDict):
        raise UserError(f"config is a {type(config).__name__}: give a recipe or a ConfigDict, see llava_jax.get_config")
    config = config.copy_and_resolve_references()
    expand_paths(config)
    return config


def get_config(recipe: str | os.PathLike) -> ConfigDict:
    """The options of a training run, which may be changed before it begins.

    ```python
    config = llava_jax.get_config("finetune:7b")
    config.init = "runs/pretrain"
    config.data.json, config.data.images = "data.json", "images"
    ```

    Args:
      recipe: the name of one that the package has (`pretrain`, `finetune`, `finetune_lora`, `llava_next`, `scienceqa`)
        or the path of a file with a function `get_config`; the function's argument may follow after a colon.

    Returns:
      A locked `ConfigDict`; `llava_jax/recipes/common.py` explains each option.

    Raises:
      UserError: there is no such recipe. Errors of the file itself are raised as they are.
    """
    recipe = expand_home(os.fspath(recipe))
    file, colon, argument = find(recipe).partition(":")
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such recipe")
    function = runpy.run_path(file).get("get_config")
    if function is None:
        raise UserError(f"{file}: is no recipe: it has no function get_config")
    try:
        config = function(argument) if colon else function()
    except ValueError as error:
        if recipe.partition(":")[0] in NAMES:
            raise UserError(f"--config={recipe}: {error}") from error
        raise
    expand_paths(config)
    return config


def expand_paths(config: ConfigDict) -> None:
    """Replaces `~` by the home directory in all paths. A ConfigDict in a sequence, such as a data set of a mixture,
    becomes a dict."""
    with config.unlocked():
        for key, value in config.items():
            if isinstance(value, ConfigDict):
                expand_paths(value)
                continue
            if isinstance(value, list | tuple):
                value = type(value)(each.to_dict() if isinstance(each, ConfigDict) else each for each in value)
            if (expanded := expand_home(value)) != config[key]:
                config[key] = expanded
