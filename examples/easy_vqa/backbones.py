"""Makes what LLaVA starts from: the data as LLaVA JSON, a tower and a language model in Hugging Face's format."""

from pathlib import Path

from examples.easy_vqa import data, language_model, tower
from llava_jax.cli import Parser, run


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m examples.easy_vqa.backbones", description=__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="D", help="gets data/, clip/ and llama/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-language-model", action="store_true", help="leave llama/ out")
    args = parser.parse_args(argv)
    data.write(args.output / "data", args.seed)
    tower.train(args.output / "clip", args.seed)
    if not args.no_language_model:
        language_model.train(args.output / "llama", args.seed)


if __name__ == "__main__":
    run(main)
