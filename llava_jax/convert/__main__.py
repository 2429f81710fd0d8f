"""Converts weights from and to Hugging Face: `python -m llava_jax.convert import|export|verify|copy|merge|...`."""

import argparse
import dataclasses

from llava_jax.cli import Parser, run, say
from llava_jax.data.conversation import IMAGE_POSITIONS

# Each command imports its modules after its arguments are parsed: --help does not wait for JAX, which takes seconds.
ANY_CHECKPOINT = "an import, a training workdir or one step of it"
DTYPES = ("float32", "bfloat16", "float16")

EXAMPLE = """examples:
  python -m llava_jax.convert import --llm vicuna-7b --vision clip-vit-large-patch14 --output checkpoints/start
  python -m llava_jax.convert import --llava llava-1.5-7b-hf --output checkpoints/llava
  python -m llava_jax.convert import --llava llava-hf/llava-1.5-7b-hf@main --output checkpoints/llava
  python -m llava_jax.convert import --llava llava-v1.5-7b-lora --base vicuna-7b --vision clip-vit-large-patch14-336 \\
    --output checkpoints/llava
  python -m llava_jax.convert export --checkpoint runs/finetune --output my-llava-hf
  python -m llava_jax.convert export --checkpoint runs/pretrain --layout projector --output my-projector
  python -m llava_jax.convert export --checkpoint runs/finetune-lora --layout peft --output my-adapter --base my-base
  python -m llava_jax.convert verify --checkpoint runs/finetune --hf my-llava-hf
  python -m llava_jax.convert copy --checkpoint runs/finetune --output checkpoints/finetuned
  python -m llava_jax.convert merge --checkpoint runs/finetune-lora --output checkpoints/merged
  python -m llava_jax.convert copy-frozen --checkpoint runs/finetune"""


def main(argv: list[str] | None = None) -> int | None:
    parser = Parser(prog="python -m llava_jax.convert", description=__doc__, epilog=EXAMPLE)
    commands = parser.add_subparsers(required=True, metavar="import|export|verify|copy|merge|copy-frozen")
    for add in (_add_import, _add_export, _add_verify, _add_copies):
        add(commands)
    args = parser.parse_args(argv)
    return args.function(args)


def _add_import(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "import",
        help="Hugging Face weights to a checkpoint",
        description="Makes a checkpoint from a language model and a vision tower (--llm, --vision), or from a LLaVA "
        "(--llava). If there is no such directory, organisation/name or organisation/name@revision is downloaded from "
        "the Hugging Face Hub. docs/weights.md lists the supported inputs, docs/models.md the families.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("--llm", metavar="DIR", help="a LLaMA, Mistral, Qwen, Phi-3 or Gemma 3 with its tokenizer, or as GGUF")
    add("--vision", metavar="DIR", help="a CLIP or SigLIP, or its vision tower; with --llava if that has none")
    add("--projector", metavar="FILE", help="a projector, safetensors or .bin (default: a fresh one)")
    add("--llava", metavar="DIR", help="a LLaVA of transformers, or of the original: a complete model, an adapter, a "
        "difference from a base, or a projector of stage 1")  # fmt: skip
    add("--base", metavar="DIR", help="with --llava: the model it was trained from, if it is not complete")
    add("--unmerged", action="store_true", help="with --llava and --base: keep an adapter beside the weights, to train "
        "it further, instead of adding it to them")  # fmt: skip
    add("--output", metavar="DIR", required=True, help="the checkpoint to write; must not exist")
    add("--template", metavar="NAME", help="conversation template (default: the one that equals the tokenizer's chat "
        "template, or v1)")  # fmt: skip
    add("--projector-type", metavar="TYPE", help="linear or mlpNx_gelu (default: the source's, or mlp2x_gelu)")
    add("--aspect", choices=("square", "pad", "resize"), help="how an image becomes a square: cropped, padded or "
        "stretched (default: pad; with --llava as its preprocessor_config.json says)")  # fmt: skip
    add("--image-position", choices=IMAGE_POSITIONS, help="position of images in a turn, in training (default: first; "
        "with --llava an export of this project says it)")  # fmt: skip
    add("--select-layer", type=int, metavar="N", help="layer whose features are used (default: -2, or the source's)")
    add("--select-feature", choices=("patch", "cls_patch"), help="without or with the class token (default: patch)")
    add("--grid-order", choices=("original", "transformers"), help="of a LLaVA-1.6: whose code trained it, which "
        "decides between 1 x 2 and 2 x 1 tiles of small images (default: whose files they are)")  # fmt: skip
    add("--rows", choices=("source", "tokenizer"), default="source", help="rows of embeddings and head: those of the "
        "source, or one an id of the tokenizer, new ones the mean of the others (default: %(default)s)")  # fmt: skip
    add("--base-dtype", choices=("int8", "nf4"), default="", help="quantize the linear layers of the language "
        "model, to train adapters on them (docs/quantization.md); by default they are stored as they are")  # fmt: skip
    add("--seed", type=int, default=0, help="of a fresh projector (default: 0)")
    parser.set_defaults(function=lambda args: _import(parser, args))


def _import(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.unmerged and not args.llava:
        parser.error("--unmerged goes with --llava")
    if args.grid_order and not args.llava:
        parser.error("--grid-order goes with --llava")
    from llava_jax.convert.found import Options
    from llava_jax.convert.import_weights import import_backbones, import_llava

    options = Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)})
    if args.llava and not (args.llm or args.projector):
        config = import_llava(args.llava, args.output, options, args.base, args.vision)
    elif args.llm and args.vision and not (args.llava or args.base):
        config = import_backbones(args.llm, args.vision, args.projector, args.output, options)
    else:
        parser.error("give --llm and --vision, or --llava")
    say(
        f"{args.output}: projector {config.projector_type}, {config.image_tokens} features an image of "
        f"{config.vision.image_size} pixels, images {config.image_aspect}"
    )


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="a checkpoint to a Hugging Face directory, or to the original's layout",
        description="Writes a directory that LlavaForConditionalGeneration and AutoProcessor load; with --layout "
        "original one that the original LLaVA loads, with --layout projector the files of its stage 1. Adapters (LoRA) "
        "are added to the weights; with --layout peft they are written alone, as PEFT loads them.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", required=True, help=ANY_CHECKPOINT)
    add("--output", metavar="DIR", required=True, help="the model to write; must not exist")
    add("--dtype", choices=DTYPES, help="type of the weights (default: as stored)")
    add("--layout", choices=("hf", "original", "projector", "peft"), default="hf", help="(default: %(default)s)")
    add("--tower", metavar="NAME", help="the vision tower that the original loads, a directory or a name on the Hub "
        "(default: OpenAI's with the same shapes)")  # fmt: skip
    add("--without-tower", action="store_true", help="with --layout original: only name the vision tower, as v0 and v1 "
        "do, without its weights")  # fmt: skip
    add("--base", metavar="DIR", help="with --layout peft: also write the model that the adapter is for, in layout hf, "
        "with the trained projector: the adapter has low-rank matrices alone then, as servers need it")  # fmt: skip
    add("--transformers", choices=("4.51", "4.52"), help="with --layout peft: the oldest version that loads it "
        "(default: 4.52; 4.51 has other names)")  # fmt: skip
    parser.set_defaults(function=lambda args: _export(parser, args))


def _export(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.layout != "peft" and (args.base or args.transformers):
        parser.error("--base and --transformers go with --layout peft")
    if args.layout == "peft" and args.dtype:
        parser.error("adapters are float32: leave --dtype out")
    if args.layout in ("hf", "peft") and args.tower:
        parser.error("--tower goes with --layout original or projector")
    if args.layout != "original" and args.without_tower:
        parser.error("--without-tower goes with --layout original")
    from llava_jax.convert.export import export
    from llava_jax.convert.export_original import export_original, export_projector
    from llava_jax.convert.export_peft import export_peft

    match args.layout:
        case "hf":
            export(args.checkpoint, args.output, args.dtype)
            use = "load it with LlavaForConditionalGeneration and AutoProcessor of transformers"
        case "original":
            export_original(args.checkpoint, args.output, args.dtype, args.tower, not args.without_tower)
            use = "load it with the original LLaVA, from a path that contains llava, which it requires"
        case "projector":
            export_projector(args.checkpoint, args.output, args.dtype, args.tower)
            use = "give its mm_projector.bin to --pretrain_mm_mlp_adapter of the original"
        case "peft":
            export_peft(args.checkpoint, args.output, args.base, args.transformers or "4.52")
            base = f"the model in {args.base}" if args.base else "the model that it was trained from"
            use = f"load it with PeftModel.from_pretrained of PEFT, on {base}"
    say(f"{args.output}: {use}")


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "verify",
        help="compares a checkpoint with a Hugging Face directory of it",
        description="Compares a checkpoint with a Hugging Face directory of it: tensors, bit for bit, configuration "
        "and, if torch is installed, logits, ids and answers. Exits with 1 if anything differs.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--checkpoint", metavar="DIR", required=True, help=ANY_CHECKPOINT)
    parser.add_argument("--hf", metavar="DIR", required=True, help="its export, or the directory it was imported from")
    parser.set_defaults(function=_verify)


def _verify(args: argparse.Namespace) -> int:
    from llava_jax.convert import verify

    equal = True
    for finding in verify.verify(args.checkpoint, args.hf):
        say(finding, flush=True)
        equal = equal and finding.equal is not False
    return 0 if equal else 1


def _add_copies(commands: argparse._SubParsersAction) -> None:
    for name, copies, description in (
        ("copy", _copy, "Writes a checkpoint with all parameters, which needs no other one, without the optimizer's "
         "state."),
        ("merge", _merge, "Writes a checkpoint with the adapters (LoRA) added to the weights: sums in float32, rounded "
         "once to the type of the weights."),
        ("copy-frozen", _copy_frozen, "Copies the frozen parameters of a training workdir from the checkpoint that the "
         "run started from into the workdir. Afterwards that checkpoint can be moved or deleted."),
    ):  # fmt: skip
        parser = commands.add_parser(name, help=copies.__doc__, description=description, epilog=EXAMPLE)
        parser.add_argument("--checkpoint", metavar="DIR", required=True, help="a training workdir, or one step of it")
        parser.add_argument("--source", metavar="DIR", help="an address on an object store that the checkpoint names "
                            "and that may be read")  # fmt: skip
        if name != "copy-frozen":
            parser.add_argument("--output", metavar="DIR", required=True, help="must not exist")
        parser.set_defaults(function=copies)


def _copy(args: argparse.Namespace) -> None:
    """a training workdir to a checkpoint of its own"""
    from llava_jax.convert.copy import copy

    copy(args.checkpoint, args.output)
    say(f"{args.output}: all parameters, without the optimizer's state")


def _merge(args: argparse.Namespace) -> None:
    """a checkpoint with adapters to one without"""
    from llava_jax.convert.copy import merge

    lost = merge(args.checkpoint, args.output)
    say(f"{args.output}: adapters merged; rounding changed what they add by {lost:.2%} (rms)")


def _copy_frozen(args: argparse.Namespace) -> None:
    """the frozen parameters of a training workdir into it"""
    from llava_jax.convert.copy import copy_frozen

    copied = copy_frozen(args.checkpoint)
    say(f"{args.checkpoint}: {'copied from ' + ', '.join(copied) if copied else 'has a copy already'}")


if __name__ == "__main__":
    run(main)
