"""Answers the questions of a benchmark, with a checkpoint or with any model behind an OpenAI-compatible API."""

import argparse
from pathlib import PurePath

from llava_jax.cli import Parser, UserError, positive
from llava_jax.data.names import add_allow_absolute
from llava_jax.evaluate.benchmarks import listing, require
from llava_jax.evaluate.questions import read_questions
from llava_jax.inference.options import add_checkpoint, add_sampling
from llava_jax.llm_api.options import OF_API, add_api_arguments, add_output_arguments

EPILOG = f"""examples:
  python -m llava_jax.evaluate predict pope --questions llava_pope_test.jsonl --images val2014 \\
    --checkpoint runs/finetune --output answers.jsonl
  python -m llava_jax.evaluate predict vqav2 --questions v2_OpenEnded_mscoco_test-dev2015_questions.json \\
    --images test2015 --endpoint http://localhost:8000/v1 --model llava --output answers.jsonl

The same command again goes on where it was interrupted. Questions are JSONL of question_id, image and text, LLaVA JSON,
or the benchmark's own file (of mme its folder); what v1.5 was told after each question is added unless it's there.
On several hosts the same command runs on each, as that of training.

benchmarks:
{listing("what")}"""

OF_CHECKPOINT = ("template", "batch_rows", "devices_each", "coordinator", "num_processes", "process_id")


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    benchmark = require(args.benchmark, "what")
    suffix = benchmark.suffix if args.suffix is None else args.suffix
    questions = read_questions(args.questions, suffix, benchmark.questions)[: args.limit]
    if args.max_tokens is None:
        args.max_tokens = benchmark.max_new_tokens
    if args.model_id is None:
        args.model_id = args.model or PurePath(args.checkpoint.rstrip("/")).name
    if args.checkpoint:
        from llava_jax.evaluate.prediction import predict  # imports JAX
    else:
        from llava_jax.evaluate.endpoint import predict
    predict(args, questions)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.evaluate predict", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("benchmark", metavar="BENCH", help="one of those below")
    add("--questions", required=True, nargs="+", metavar="F", help="one file or several")
    add("--images", default="", metavar="DIR", help="the folder that names of pictures are relative to")
    add_allow_absolute(parser)
    add_checkpoint(parser, required=False)
    add("--model", metavar="NAME", help="instead of a checkpoint, the model of an endpoint")
    add("--model-id", metavar="NAME", help="by whom answers are said to be (default: the model, or the checkpoint's "
        "folder)")  # fmt: skip
    add("--suffix", metavar="TEXT", help="what follows each question, '' for nothing (default: as for v1.5)")
    add("--limit", type=positive, metavar="N", help="the first N questions only")
    add_sampling(parser)

    add = parser.add_argument_group("with a checkpoint").add_argument
    add("--batch-rows", type=positive, default=16, metavar="N", help="answers at a time on a device (default: 16)")
    add("--devices-each", type=positive, default=1, metavar="N", help="devices that each copy of the model is split "
        "over (default: 1)")  # fmt: skip
    add("--picture-last", action="store_true", help="after the question, as the models of the paper saw it")
    add("--answer-prompter", action="store_true", help="scienceqa, QCM-LEPA: ask for the answer after the reasons")
    add("--coordinator", metavar="HOST:PORT", help="where several processes meet, if they don't find each other")
    add("--num-processes", type=positive, metavar="N", help="how many there are")
    add("--process-id", type=int, metavar="N", help="which of them this is, from 0")

    add_output_arguments(parser, "answers")
    add_api_arguments(parser, temperature=0.0, max_tokens="as the benchmark needs")
    args = parser.parse_args(argv)
    if args.checkpoint and args.base_url or not (args.checkpoint or args.base_url or args.model):
        raise UserError("give either --checkpoint or --endpoint with --model")
    if not args.checkpoint and not args.model:
        raise UserError("--endpoint needs --model, the name of the model there")
    if not args.checkpoint and (args.picture_last or args.answer_prompter):
        raise UserError(
            "--picture-last and --answer-prompter are for checkpoints: an endpoint has a template of its own"
        )
    others = OF_API if args.checkpoint else OF_CHECKPOINT
    if given := [name for name in others if getattr(args, name) != parser.get_default(name)]:
        option = f"--{given[0].replace('_', '-')}"
        raise UserError(
            f"{option}: is for endpoints, not for a checkpoint" if args.checkpoint
            else f"{option}: is for checkpoints: an endpoint has a template and devices of its own"
        )  # fmt: skip
    return args
