"""The argument of the published recipes, as in `configs/finetune.py:13b,v1.5`."""

# Rows at once on a device: with them 16 TPU v5e train 7B, and 8 H100 13B; `llava_jax.preflight --search=batch` finds
# how many more fit elsewhere.
MAX_ROWS_PER_DEVICE = {"7b": 4, "13b": 2}
CHOICES = {"size": ("7b", "13b"), "recipe": ("v1.5", "v0")}


def parse(arg: str | None) -> tuple[str, str]:
    """`""`, `"13b"`, `"v0"`, `"13b,v0"` -> (size, recipe), by default 7b and v1.5."""
    chosen = {kind: choices[0] for kind, choices in CHOICES.items()}
    for word in filter(None, (arg or "").split(",")):
        kinds = [kind for kind, choices in CHOICES.items() if word in choices]
        if not kinds:
            known = ", ".join(choice for choices in CHOICES.values() for choice in choices)
            raise ValueError(f"{word!r} in {arg!r} is none of {known}")
        chosen[kinds[0]] = word
    return chosen["size"], chosen["recipe"]
