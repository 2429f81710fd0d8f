"""The argument of the published recipes, as in `--config=finetune:13b,v1.5`."""

from ml_collections import ConfigDict

# Rows at once on a device, by size: 7B fits on 16 TPU v5e and 13B on 8 H100. `llava_jax.preflight --search=batch` finds
# how many rows fit on other hardware.
MAX_ROWS_PER_DEVICE = {"7b": 4, "13b": 2}
CHOICES = {"size": ("7b", "13b"), "recipe": ("v1.5", "v0")}


def parse(arg: str | None) -> tuple[str | None, str]:
    """`""`, `"13b"`, `"v0"`, `"13b,v0"` -> (size, recipe), by default None and v1.5."""
    chosen = {"size": None, "recipe": "v1.5"}
    for word in filter(None, (arg or "").split(",")):
        kinds = [kind for kind, choices in CHOICES.items() if word in choices]
        if not kinds:
            known = ", ".join(choice for choices in CHOICES.values() for choice in choices)
            raise ValueError(f"{word!r} in {arg!r} is none of {known}")
        chosen[kinds[0]] = word
    return chosen["size"], chosen["recipe"]


def set_size(config: ConfigDict, recipe: str, size: str | None, published: str = "7b") -> None:
    """Sets the options that depend on the size of the model. Without a size, a checkpoint may have any, and the other
    options are those for the `published` size."""
    config.default_model = f"llava-{recipe}-{size or published}"
    config.model = config.default_model if size else ""
    config.max_rows_per_device = MAX_ROWS_PER_DEVICE[size or published]
