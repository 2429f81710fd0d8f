"""Answers the questions of a benchmark, with a checkpoint or with any model behind an OpenAI-compatible API."""

import argparse
from pathlib import PurePath

from llava_jax.cli import Parser, UserError, positive
from llava_jax.data.image_folder import add_allow_absolute
from llava_jax.evaluate.benchmarks import find, listing
from llava_jax.evaluate.questions import read_questions
from llava_jax.inference.options import add_checkpoint, add_sampling
from llava_jax.llm_api.options import OF_API, add_api_arguments, add_output_arguments

EPILOG = f"""examples:
  python -m llava_jax.evaluate predict pope --questions llava_pope_test.jsonl --images val2014 \\
    --checkpoint runs/finetune --output answers.jsonl
  python -m llava_jax.evaluate predict vqav2 --questions v2_OpenEnded_mscoco_test-dev2015_questions.json \\
    --images test2015 --endpoint http://localhost:8000/v1 --model llava --output answers.jsonl

The same command resumes where it was interrupted. Questions are JSONL of question_id, image and text, LLaVA JSON, or
the benchmark's own file (of mme its folder). The suffix of the v1.5 release is added to each question unless it is
there. On several hosts, run the same command on each, as for training.

benchmarks:
{listing("what")}"""

OF_CHECKPOINT = ("template", "batch_rows", "devices_each", "coordinator", "num_processes", "process_id")


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    benchmark = find(args.benchmark, "what")
    benchmark = benchmark.asked_as(args.prompt) if args.prompt else benchmark
    suffix = benchmark.suffix if args.suffix is None else args.suffix
    questions = read_questions(args.questions, suffix, benchmark.questions)[: args.limit]
    if args.max_tokens is None:
        args.max_tokens = benchmark.max_new_tokens
    if args.model_id is None:
        args.model_id = args.model or PurePath(args.checkpoint.rstrip("/")).name
    if args.checkpoint:
        from llava_jax.evaluate.predict_checkpoint import predict  # imports JAX
    else:
        from llava_jax.evaluate.predict_endpoint import predict
    predict(args, questions)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.evaluate predict", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("benchmark", metavar="BENCH", help="one of those below, or MODULE:NAME of your own")
    add("--questions", required=True, nargs="+", metavar="F", help="one file or several")
    add("--images", default="", metavar="DIR", help="the folder of the images")
    add_allow_absolute(parser)
    add_checkpoint(parser, required=False)
    add("--model", metavar="NAME", help="instead of a checkpoint, the model of an endpoint")
    add("--model-id", metavar="NAME", help="name of the model in the answers (default: the model, or the checkpoint's "
        "folder)")  # fmt: skip
    add("--suffix", metavar="TEXT", help="text after each question, '' for none (default: that of v1.5)")
    add("--prompt", metavar="NAME", help="ask as a toolkit does: official, lmms-eval, vlmevalkit (its LLaVA) or "
        "vlmevalkit-api (its models behind an API); default: lmms-eval")  # fmt: skip
    add("--limit", type=positive, metavar="N", help="the first N questions only")
    add_sampling(parser)

    add = parser.add_argument_group("with a checkpoint").add_argument
    add("--batch-rows", type=positive, default=16, metavar="N", help="answers at a time on a device (default: 16)")
    add("--devices-each", type=positive, default=1, metavar="N", help="devices over which each copy of the model is "
        "split (default: 1)")  # fmt: skip
    add("--picture-last", action="store_true", help="put the image after the question, as in the paper")
    add("--answer-prompter", action="store_true", help="scienceqa, QCM-LEPA: ask for the answer after the reasons")
    add("--coordinator", metavar="HOST:PORT", help="the first process, if processes do not find each other")
    add("--num-processes", type=positive, metavar="N", help="number of processes")
    add("--process-id", type=int, metavar="N", help="number of this process, from 0")

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
