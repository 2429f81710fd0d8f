"""Answers the questions of a benchmark, with a checkpoint or with any model behind an OpenAI-compatible API."""

import argparse
from pathlib import PurePath

from llava_jax.cli import Parser, UserError, positive
from llava_jax.evaluate.benchmarks import listing, require
from llava_jax.evaluate.questions import read_questions

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


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    benchmark = require(args.benchmark, "what")
    suffix = benchmark.suffix if args.suffix is None else args.suffix
    questions = read_questions(args.questions, suffix, benchmark.questions)[: args.limit]
    if args.max_new_tokens is None:
        args.max_new_tokens = benchmark.max_new_tokens
    if args.model_id is None:
        args.model_id = args.model or PurePath(args.checkpoint.rstrip("/")).name
    if args.endpoint:
        from llava_jax.evaluate.endpoint import predict
    else:
        from llava_jax.evaluate.prediction import predict  # imports JAX
    predict(args, questions)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m llava_jax.evaluate predict",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("benchmark", metavar="BENCH", help="one of those below")
    add("--questions", required=True, nargs="+", metavar="F", help="one file or several")
    add("--images", default="", metavar="DIR", help="the folder that names of pictures are relative to")
    add("--output", required=True, metavar="F", help="where the answers go, JSONL")
    add("--checkpoint", metavar="D", help="an import, a workdir or a step of it")
    add("--endpoint", metavar="URL", help="of an OpenAI-compatible server, with its /v1; the key is in OPENAI_API_KEY")
    add("--model", metavar="NAME", help="the endpoint's model")
    add("--model-id", metavar="NAME", help="by whom answers are said to be (default: the model, or the checkpoint's "
        "folder)")  # fmt: skip
    add("--suffix", metavar="TEXT", help="what follows each question, '' for nothing (default: as for v1.5)")
    add("--limit", type=positive, metavar="N", help="the first N questions only")
    add("--max-new-tokens", type=positive, metavar="N", help="of an answer (default: as the benchmark needs)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest with this probability")
    add("--seed", type=int, default=0, help="of sampling")

    add = parser.add_argument_group("with a checkpoint").add_argument
    add("--template", metavar="NAME", help="instead of the checkpoint's")
    add("--batch-rows", type=positive, default=16, metavar="N", help="answers at a time on a device (default: 16)")
    add("--devices-each", type=positive, default=1, metavar="N", help="devices that each copy of the model is split "
        "over (default: 1)")  # fmt: skip
    add("--picture-last", action="store_true", help="after the question, as the models of the paper saw it")
    add("--answer-prompter", action="store_true", help="scienceqa, QCM-LEPA: ask for the answer after the reasons")
    add("--coordinator", metavar="HOST:PORT", help="where several processes meet, if they don't find each other")
    add("--num-processes", type=positive, metavar="N", help="how many there are")
    add("--process-id", type=int, metavar="N", help="which of them this is, from 0")

    add = parser.add_argument_group("with an endpoint").add_argument
    add("--concurrency", type=positive, default=16, metavar="N", help="requests under way (default: 16)")
    add("--requests-a-minute", type=float, metavar="N", help="that the server is known to take")
    add("--prices", type=float, nargs=2, default=(0.0, 0.0), metavar="$", help="dollars for a million tokens of "
        "prompts and of answers")  # fmt: skip
    add("--budget", type=float, metavar="$", help="dollars that may be spent in all, with --prices")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds for an answer (default: 600)")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.endpoint):
        raise UserError("give either --checkpoint or --endpoint with --model")
    if args.endpoint and not args.model:
        raise UserError("--endpoint needs --model, the name of the model there")
    if args.endpoint and (args.picture_last or args.answer_prompter):
        raise UserError(
            "--picture-last and --answer-prompter are for checkpoints: an endpoint has a template of its own"
        )
    return args
