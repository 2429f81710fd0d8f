"""What a run starts from: a checkpoint, its model and its chat template; on a resume, a step of its own workdir."""

import dataclasses

from etils import epath
from ml_collections import ConfigDict

from llava_jax import remote
from llava_jax.checkpoint.reading import Checkpoint, open_checkpoint, open_step
from llava_jax.cli import UserError, warn
from llava_jax.data.anyres import AnyRes, Grid
from llava_jax.data.templates import Template, choose_template, get_template
from llava_jax.models.config import PRESETS, LlavaConfig
from llava_jax.parallel import distributed
from llava_jax.training.adapters import adapted
from llava_jax.training.workdir import resumes, start_step


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from."""

    source: Checkpoint  # that of `config.init` or, on a resume, the step of the workdir
    model: LlavaConfig  # its model, with the settings for images of this run
    template: Template  # of the chats of this run
    step: int  # how many are done
    resumed: bool  # whether `source` is a step of the workdir
    goes_back: bool  # whether newer steps of the workdir have to be set aside


def find_start(config: ConfigDict, workdir: epath.Path, resume_from: int | None) -> Start:
    """Opens what to start from. A run that resumes takes everything from its workdir and doesn't need `config.init`."""
    remote.name(config.init, workdir)
    resumed = resumes(workdir)
    if resume_from is not None and not resumed:
        raise UserError(f"{workdir}: has no step to resume from: leave --resume-from out")
    if not (resumed or config.init):
        raise UserError("config.init is not set: give --config.init=...")
    step = start_step(workdir, resume_from, distributed.is_first()) if resumed else 0
    source = open_step(workdir, step) if resumed else open_checkpoint(config.init)
    source = source.quantized(config.base_dtype)
    check_preset(config.model, source)
    model = adapted(with_images(source.config, config), config)
    if model.im_start_end and config.stage == "pretrain":
        raise UserError(
            f"{source.root}: has mm_use_im_start_end, whose two tokens stage 1 would have to train with the projector, "
            "which is not supported: train stage 2, or start from a model without them"
        )
    if config.max_length > (known := model.text.max_position_embeddings):
        warn(f"config.max_length is {config.max_length}, and the language model knows {known} positions "
             "(max_position_embeddings): later ones are new to it")  # fmt: skip
    return Start(source, model, _template(config, source), step, resumed, goes_back=resumed and step == resume_from)


def with_images(model: LlavaConfig, config: ConfigDict) -> LlavaConfig:
    """The model with a run's settings for images. Raises UserError where they contradict each other or the model."""
    aspect, grids = config.image_aspect or model.image_aspect, config.anyres.grids
    given = {name: value for name, value in config.anyres.items() if value}
    if aspect != "anyres":
        if given:
            raise UserError(f"config.anyres.{min(given)} is for image_aspect=anyres, which is {aspect}")
        if model.anyres and model.anyres.newline:
            raise UserError(
                f"config.image_aspect is {aspect}, which would drop the newline that the model was trained with: set "
                "image_aspect=anyres"
            )
    try:
        if "grids" in given:
            given["grids"] = tuple(Grid(*grid) for grid in grids)
        anyres = dataclasses.replace(model.anyres or AnyRes(), **given) if aspect == "anyres" else None
        return dataclasses.replace(model, image_aspect=aspect, image_position=config.image_position, anyres=anyres)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.anyres: {error}") from None


def check_preset(preset: str, checkpoint: Checkpoint) -> None:
    """Raises UserError if the checkpoint has other sizes than the preset; the vocabulary may have grown."""
    if not preset:
        return
    if preset not in PRESETS:
        raise UserError(f"config.model is {preset!r}, not one of {', '.join(PRESETS)}")
    free = {"vocab_size", "max_position_embeddings", "rms_norm_eps", "image_aspect", "im_start_end", "projection_dim"}
    free |= {"image_position", "base_dtype", "anyres", "vision", "text"}  # the last two are compared field by field
    differing = []
    for part in ("vision", "text", None):
        wanted, found = (getattr(c, part) if part else c for c in (PRESETS[preset], checkpoint.config))
        for field in dataclasses.fields(wanted):
            a, b = getattr(wanted, field.name), getattr(found, field.name)
            if a != b and field.name not in free:
                differing.append(f"{f'{part}.' if part else ''}{field.name} {b}, not {a}")
    if differing:
        raise UserError(
            f"{checkpoint.root} is not a {preset} (config.model): it has {'; '.join(differing)}; "
            "give --config.model= to train a checkpoint of any size"
        )


def _template(config: ConfigDict, source: Checkpoint) -> Template:
    """The chat template of the run. Warns if a finetuned model was trained with another one, or with another
    `image_position`."""
    if source.description.stage == "finetune":
        trained = source.config.image_position
        if trained != config.image_position:
            warn(f"the checkpoint was trained with image_position {trained}, not {config.image_position}")
        return choose_template(config.template, source.template)
    return get_template(config.template)
