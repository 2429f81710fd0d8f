"""Makes instruction data from images with captions and boxes."""

from llava_jax.cli import dispatch, run

COMMANDS = {  # name: its function, and what it does
    "conversation": ("llava_jax.datagen.generate:conversation", "conversations by a language model, from captions"),
    "detail": ("llava_jax.datagen.generate:detail", "... detailed descriptions, from captions and boxes"),
    "reasoning": ("llava_jax.datagen.generate:reasoning", "... questions that need reasoning, and their answers"),
    "captions": ("llava_jax.datagen.captions:main", "samples of stage 1: an instruction for each caption"),
    "filter": ("llava_jax.datagen.filter:main", "selects captions so that concepts are balanced, as CC3M-595K"),
    "report": ("llava_jax.datagen.report:main", "reports the quality of any LLaVA JSON as an HTML page"),
}


def main(argv: list[str] | None = None) -> int | None:
    return dispatch("python -m llava_jax.datagen", __doc__, COMMANDS, argv, unknown=2)


if __name__ == "__main__":
    run(main)
