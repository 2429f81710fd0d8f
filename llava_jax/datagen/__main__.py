"""Makes instruction data from pictures that have captions and boxes."""

from llava_jax.cli import dispatch, run

COMMANDS = {  # what is typed: its function, and what it does
    "conversation": ("llava_jax.datagen.generate:conversation", "a language model makes conversations of captions"),
    "detail": ("llava_jax.datagen.generate:detail", "... detailed descriptions of captions and boxes"),
    "reasoning": ("llava_jax.datagen.generate:reasoning", "... questions that take thought, and their answers"),
    "captions": ("llava_jax.datagen.captions:main", "captions to the samples of stage 1: an instruction for each"),
    "filter": ("llava_jax.datagen.filter:main", "chooses captions so that concepts are balanced, as 595K of CC3M were"),
    "report": ("llava_jax.datagen.report:main", "the quality of any LLaVA JSON as an HTML page with its pictures"),
}


def main(argv: list[str] | None = None) -> int | None:
    return dispatch("python -m llava_jax.datagen", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    run(main)
