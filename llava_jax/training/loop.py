"""Training: what is needed, then the loop, top to bottom. The step itself is in `training_step`."""

import contextlib
import dataclasses
import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from llava_jax import cli, remote
from llava_jax.checkpoint.format import DESCRIPTION, Description, needed, read_description, write_description
from llava_jax.checkpoint.reading import Checkpoint, open_checkpoint, open_step
from llava_jax.checkpoint.training import TrainingCheckpoints
from llava_jax.checkpoint.writing import copy_tokenizer
from llava_jax.cli import UserError, say, warn
from llava_jax.data.conversation import Template, choose_template, get_template, with_im_start_end
from llava_jax.data.lengths import cached_lengths, keep_lengths
from llava_jax.data.mixture import check_folders, open_data, visits
from llava_jax.data.modality import ModalityOrder
from llava_jax.data.packing import Room, pack_orders
from llava_jax.data.pipeline import Batches, ImageDecoder, TextEncoder, measure
from llava_jax.data.plan import Layout, Lengths, Order, plan_layout, split
from llava_jax.data.sources import Source
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.evaluate.in_training import Evaluation
from llava_jax.files.lock import hold
from llava_jax.models.config import PRESETS, LlavaConfig
from llava_jax.models.llava import Params
from llava_jax.parallel import compilation_cache, distributed, sharding
from llava_jax.parallel.hardware import peak_flops
from llava_jax.training import builder, config_check, flops, optim, tracking
from llava_jax.training.bad_samples import BadSamples, check_texts
from llava_jax.training.goodput import Goodput
from llava_jax.training.metrics import BAD_SAMPLES, METRICS, MetricsWriter, Screen
from llava_jax.training.profiling import Profile
from llava_jax.training.signals import catch_signals
from llava_jax.training.step import TrainState
from llava_jax.training.summary import introduce, show_first_sample, warn_of_moved_images
from llava_jax.training.workdir import claim, fingerprint, resumes, set_aside, start_step

# Called with (step, metrics).
Callback = Callable[[int, Mapping[str, float]], None]


def train(
    config: ConfigDict, workdir: str, resume_from: int | None = None, *, callbacks: Sequence[Callback] = ()
) -> None:
    """Trains one stage; called again with the same configuration and workdir it resumes.

    Args:
      config: a recipe's configuration, see configs/common.py.
      workdir: a directory, local or remote, for checkpoints, metrics and logs.
      resume_from: the step to resume from; by default the newest one.
      callbacks: each is called on process 0 with a step and its metrics: for every logged step, once its loss is known
        to be finite, and for every validation loss and benchmark score.

    Raises UserError for what the user can mend, before the first step wherever possible, and where another process
    trains in that workdir.
    """
    goodput = Goodput()
    config_check.check(config)
    directory = epath.Path(workdir)
    with hold(directory) if distributed.is_first() else contextlib.nullcontext(lambda: None) as check:
        distributed.barrier("lock")
        _train(config, directory, resume_from, goodput, check, callbacks)


def _train(
    config: ConfigDict,
    directory: epath.Path,
    resume_from: int | None,
    goodput: Goodput,
    check: Callable[[], None],
    callbacks: Sequence[Callback],
) -> None:
    """The same within the lock of the workdir; `check` raises UserError once that is lost."""
    compilation_cache.use(config.compilation_cache)
    mesh = sharding.make_mesh(config.mesh.to_dict())

    # ---- What to start from
    # A run that resumes takes everything from its workdir, so that it does not depend on `init`.
    remote.name(config.init, directory)
    start = start_step(directory, resume_from, distributed.is_first()) if (resumed := resumes(directory)) else None
    if resume_from is not None and not resumed:
        raise UserError(f"{directory}: has no step to resume from: leave --resume-from out")
    if not (resumed or config.init):
        raise UserError("config.init is not set: give --config.init=...")
    source = open_step(directory, start) if resumed else open_checkpoint(config.init)
    _check_preset(config.model, source)
    model = dataclasses.replace(
        source.config,
        image_aspect=config.image_aspect or source.config.image_aspect,
        image_position=config.image_position,
    )
    if model.im_start_end and config.stage == "pretrain":
        raise UserError(
            f"{source.root}: has mm_use_im_start_end, whose two tokens stage 1 would have to train with the projector, "
            "which is not supported: train stage 2, or start from a model without them"
        )

    # ---- Data: every error in the text, the order and the shapes are known from here on
    skip_bad = config.data.on_bad_sample == "skip"
    samples = open_data(config.data, lenient=skip_bad)
    template = _template(config, source)
    encode = TextEncoder(
        with_im_start_end(template, model.im_start_end),
        load_tokenizer(source.tokenizer_dir),
        model.image_tokens,
        config.max_length,
        config.image_position,
        config.seed,
    )
    lengths = _measure_together(samples, encode, config.data.workers, skip_bad)
    check_texts(lengths, config.data.max_bad_share)
    check_folders(samples, lengths)
    training, held_out = split(len(samples), config.data.holdout, config.seed)
    order = Order(visits(samples, training, config.seed), config.batch_rows, config.seed)
    validation = Order(held_out, config.batch_rows, None)
    if config.group_by_modality:
        fields = (order.samples, order.batch_rows, order.seed)
        order = ModalityOrder(*fields, lengths=lengths, rows_per_group=config.rows_per_group)
    if config.pack:
        room = Room(config_check.row_length(config), config.rows_per_group, config.image_slots)
        order, validation = pack_orders([order, validation], lengths, room, samples)
    steps = config.steps or order.steps(config.epochs)
    layout = plan_layout(
        [(order, steps), (validation, validation.epoch_steps(0))],
        lengths,
        rows_per_group=config.rows_per_group,
        max_length=config_check.row_length(config),
        image_tokens=model.image_tokens,
        image_size=model.vision.image_size,
        image_slots=config.image_slots,
        label_slots=config.label_slots,
    )
    asked = Evaluation(config, model, encode.tokenizer, template) if config.evaluate.benchmark else None
    decode = ImageDecoder(layout.image_size, model.image_aspect, model.image_mean)
    program = builder.build(config, model, layout, mesh, steps, source.abstract())
    groups = sharding.local_groups(mesh, layout.groups)  # each process reads what its own devices take
    batches = Batches(samples, encode, decode, order, layout, groups, skip_bad)
    validation_batches = Batches(samples, encode, decode, validation, layout, groups, skip_bad)

    # ---- The workdir, and in it what makes its checkpoints self-describing
    first = distributed.is_first()  # writes all that is written once
    if first:
        claim(directory, config, fingerprint(samples, lengths))
        description = source.description if resumed else _describe(directory, source, model, config, program.frozen)
    distributed.barrier("workdir")
    if not first:
        description = _read_shared_description(directory)

    # ---- Parameters and optimizer
    checkpoints = TrainingCheckpoints(directory, description, config.keep)
    _require_common(directory, start)
    frozen = _load(source, program.frozen)
    if start is None:
        state = program.init_state(_load(source, program.state.trainable))
        # A full disk or a wrong path fails now, not after a day.
        with goodput.measure("checkpoint"):
            checkpoints.save(0, state.trainable, state.optimizer, wait=True)
    else:
        state = _restore(checkpoints, start, program.state)
        if first and start == resume_from:
            set_aside(directory, start)  # only now that it could be read
        distributed.barrier("set aside")
        checkpoints.reload()
    start = start or 0
    if first:
        sources = needed(directory, description)
        introduce(config, directory, mesh, program.settings, steps, order, lengths, state, frozen, start, sources)
        warn_of_moved_images(samples, lengths, config.image_position)
        show_first_sample(samples[next(index for index in order.visits(0) if lengths.tokens[index])], encode)

    # ---- The loop
    eval_fn = program.evaluation()
    put = functools.partial(sharding.put_batch, mesh, layout.groups)
    rates = optim.reported_rates(config, steps)
    profile = Profile(directory, config.profile.start, config.profile.steps)
    goodput.open(directory, start)
    signals = distributed.Ballot(mesh)
    peak = peak_flops(jax.devices()[0].device_kind)  # None on CPUs
    step_flops = program.flops
    writer = MetricsWriter(directory, start, tracking.start(config, directory), check) if first else None
    screen = Screen(start, steps) if first else None
    bad = BadSamples(order, lengths, config.data.max_bad_share, start, _bad_pictures(writer))
    if first and start == 0 and skip_bad:
        bad.tell(bad.of_texts(samples, encode), writer, screen)
    began, clock = time.monotonic(), goodput.step_seconds()

    def write(step: int, values: Mapping[str, float]) -> None:
        writer.write(step, values)
        for callback in callbacks:
            callback(step, dict(values))

    def report(step: int, metrics: dict[str, jax.Array], counts: dict[str, float]) -> None:
        """Waits for a step's metrics, checks and writes them."""
        nonlocal clock
        check()
        values = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, values.values())):
            raise UserError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; nothing was saved since "
                f"step {checkpoints.latest}. The samples of this batch: {', '.join(batches.ids(step - 1))}"
            )
        goodput.done(step)
        if profile.done(step):
            with goodput.measure("profile"):
                profile.close()
        if not first:
            return
        seconds, clock = goodput.step_seconds() - clock, goodput.step_seconds()
        values |= {name: float(rate(step - 1)) for name, rate in rates.items()}
        values |= {"bad_samples": bad.count} if skip_bad else {}
        values |= _speed(counts, seconds) | {"seconds": seconds}
        if peak:
            mfu = flops.mfu(step_flops, seconds, jax.device_count(), peak)
            values |= {f"mfu_{convention}": value for convention, value in mfu.items()}
        screen.show(step, values)
        if step % config.log_every == 0 or step == steps:
            write(step, values)

    @goodput.measure("evaluation")
    def validate(step: int) -> None:
        total, count = 0.0, 0
        for batch, found in validation_batches.iterate_with_bad(0, validation.epoch_steps(0), config.data.workers):
            bad.note(step, found, "validation")
            batch_total, batch_count = eval_fn(state.trainable, frozen, put(batch))
            total, count = total + float(batch_total), count + int(batch_count)
        tell_bad(f"validation {step}")
        loss = total / max(count, 1)  # all of them may be skipped
        if first:
            write(step, {"validation_loss": loss})
            screen.say(f"step {step}: validation loss {loss:.4f}")

    @goodput.measure("evaluation")
    def ask(step: int) -> None:
        """Has the model of this step answer a benchmark."""
        scores = asked.run(step, state.trainable | frozen, program.settings.dtype, directory)
        if first:
            write(step, scores)
            screen.say(f"step {step}: " + "  ".join(f"{name} {score:g}" for name, score in scores.items()))

    def due(step: int) -> tuple[bool, bool]:
        """Whether a step ends with the validation loss, and with the benchmark."""
        last = step == steps
        validates = len(held_out) > 0 and (last or bool(config.eval_every) and step % config.eval_every == 0)
        return validates, bool(asked) and asked.due(step, steps)

    def write_account() -> None:
        check()
        goodput.write()

    def tell_bad(when: str) -> None:
        """All processes together: what each has found becomes known to all."""
        found = bad.gather(f"bad samples of {when}") if skip_bad else []
        if first:
            bad.tell(found, writer, screen)

    with contextlib.ExitStack() as closing:
        closing.callback(write_account)
        closing.callback(checkpoints.close)
        closing.push(distributed.leave_on_error)  # closing checkpoints waits for all
        for closed in (writer, screen, profile) if first else (profile,):
            closing.callback(closed.close)
        closing.enter_context(goodput.measure("step"))
        request = closing.enter_context(catch_signals())
        if asked and start == 0:  # where its model began; what is wrong with the benchmark shows now
            ask(0)
        if start:  # a crash or a signal may have come between the saving of this step and its evaluation
            written = _names_written(writer, start)
            evaluate, ask_now = due(start)
            if evaluate and "validation_loss" not in written:
                validate(start)
            if ask_now and not any(name.startswith(f"{asked.name}/") for name in written):
                ask(start)
        pending = None  # metrics are read one step late, so that the device never waits for the host
        read_ahead = goodput.waiting("data", batches.iterate_with_bad(start, steps, config.data.workers))
        for step, (batch, found) in enumerate(read_ahead, start + 1):
            if step == start + 1:
                with goodput.measure("compile"):
                    step_fn = program.lower().compile()
            with goodput.measure("profile"):
                profile.begin(step)
            with profile.step(step):
                state, metrics = step_fn(state, frozen, put(batch))
            if pending:
                report(*pending)
            rows = order.rows(step - 1)
            pending = (step, metrics, count_tokens(lengths, rows, layout))
            bad.come_to([index for row in rows for index in row])
            bad.note(step, found)
            stop, anything_bad = signals.exchange(request.signal or 0, len(bad.pending))
            # Who is told to leave has no time to evaluate: the next start does.
            evaluate, ask_now = (wanted and (not stop or step == steps) for wanted in due(step))
            save = step == steps or step % config.save_every == 0
            if anything_bad or save or stop:
                tell_bad(f"step {step}")
            verdict = bad.verdict() if skip_bad else None
            if evaluate or ask_now or save or stop or verdict:
                report(*pending)  # nothing is saved before its loss is known to be finite
                pending = None
            if save or stop or verdict:
                leaves = bool(stop or verdict) or step == steps
                check()
                with goodput.measure("checkpoint"):
                    checkpoints.save(step, state.trainable, state.optimizer, wait=leaves)
                    goodput.write()
                if first:
                    writer.flush()
            if verdict:
                cli.report(UserError(f"step {step}, which is saved: {verdict}"))
                raise distributed.LeaveTogether(1)
            if evaluate:
                validate(step)
            if ask_now:
                ask(step)
            if stop and step < steps:
                if first:
                    name = signal.Signals(stop).name
                    screen.say(f"stopped by {name} at step {step}, which is saved; the same command resumes")
                raise distributed.LeaveTogether(128 + stop)
    minutes = (time.monotonic() - began) / 60
    if first:
        say(f"{directory}: {steps} steps done, the last {steps - start} in {minutes:.1f} min", file=sys.stderr)
        say(goodput.summary(), file=sys.stderr)


# ------------------------------------------------------------------------------------------------- parts of the set-up


def _bad_pictures(writer: MetricsWriter | None) -> int:
    """How many were found before this start, which the first process knows, who has the writer."""
    found = sum(line.get("part") == "training" for line in writer.read(BAD_SAMPLES)) if writer else 0
    return int(distributed.gather("bad pictures so far", np.array([found]))[0][0])


def _names_written(writer: MetricsWriter | None, step: int) -> list[str]:
    """The metrics of a step that earlier starts wrote, for all processes; the first one has the writer."""
    lines = writer.read(METRICS) if writer else []
    names = json.dumps([name for line in lines if line["step"] == step for name in line])
    told = distributed.gather("metrics written", np.frombuffer(names.encode(), np.uint8))[0]
    return json.loads(told.tobytes())


def _measure_together(samples: Source, encode: TextEncoder, workers: int, skip_bad: bool) -> Lengths:
    """Every process measures its share of the samples, if its cache does not know them; all get the lengths of all."""
    first, count = jax.process_index(), jax.process_count()
    known = cached_lengths(samples, encode, skip_bad)
    if known is None:
        share = measure(samples, encode, workers, first=first, stride=count, skip_bad=skip_bad)
    else:
        share = [part[first::count] for part in known]
    lengths = np.zeros((len(samples), len(Lengths._fields)), np.int32)
    for process, values in enumerate(distributed.gather("lengths", np.stack(share, axis=1))):
        lengths[process::count] = values
    together = Lengths(*np.ascontiguousarray(lengths.T))
    if known is None:
        keep_lengths(samples, encode, together)
    return together


def _read_shared_description(directory: epath.Path) -> Description:
    """What process 0 has just written."""
    if not (directory / DESCRIPTION).exists():
        raise UserError(
            f"{directory}: what process 0 wrote there cannot be seen by process {jax.process_index()}: the workdir has "
            "to be on a file system that all hosts share, such as gs:// or NFS"
        )
    return read_description(directory)


def _require_common(directory: epath.Path, start: int | None) -> None:
    """Raises UserError where the processes see different steps to resume from, or some of them none."""
    seen = {int(step[0]) for step in distributed.gather("start", np.array([-1 if start is None else start]))}
    if len(seen) > 1:
        raise UserError(
            f"{directory}: the processes see different checkpoints there (steps {sorted(seen)}): the workdir has to be "
            "on a file system that all hosts share, such as gs:// or NFS"
        )


def _load(source: Checkpoint, like: Mapping[str, jax.ShapeDtypeStruct]) -> Params:
    """Parameters of a checkpoint, each in the type and with the sharding of its entry in `like`."""
    return source.load(like, lambda name, stored: like[name].dtype, lambda name: like[name].sharding)


def _restore(checkpoints: TrainingCheckpoints, step: int, like: TrainState) -> TrainState:
    """The state after a step. Nothing else of its size is made: `like` has shapes with shardings, not arrays."""
    trainable, optimizer = checkpoints.restore(step, like.trainable, like.optimizer)
    return TrainState(jax.device_put(jnp.int32(step), like.step.sharding), trainable, optimizer)


def _check_preset(preset: str, checkpoint: Checkpoint) -> None:
    """The sizes of the preset must be those of the checkpoint; rows of the vocabulary may have been added."""
    if not preset:
        return
    if preset not in PRESETS:
        raise UserError(f"config.model is {preset!r}, not one of {', '.join(PRESETS)}")
    free = {"vocab_size", "max_position_embeddings", "rms_norm_eps", "image_aspect", "im_start_end", "projection_dim"}
    free |= {"image_position", "vision", "text"}  # compared field by field
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
    """The template of the run. A model that learned conversations in another one, or with images elsewhere, is warned
    about."""
    if source.description.stage == "finetune":
        learned = source.config.image_position
        if learned != config.image_position:
            warn(f"the checkpoint was trained with image_position {learned}, not {config.image_position}")
        return choose_template(config.template, source.template)
    return get_template(config.template)


def _describe(
    directory: epath.Path, source: Checkpoint, model: LlavaConfig, config: ConfigDict, frozen: Iterable[str]
) -> Description:
    """Writes the description of a new run, and its tokenizer."""
    description = Description(
        model=model,
        template=config.template,
        hf=source.description.hf,
        sources=source.sources_of(list(frozen), directory),
        stage=config.stage,
    )
    copy_tokenizer(source.tokenizer_dir, directory / "tokenizer")
    write_description(directory, description)
    return description


def _speed(counts: dict[str, float], seconds: float) -> dict[str, float]:
    """What `count_tokens` found in a batch, by the second and as shares."""
    return {
        "tokens_per_second": counts["tokens"] / seconds,
        "images_per_second": counts["images"] / seconds,
        "learned_share": counts["learned"] / max(counts["tokens"], 1),
        "padding_share": 1 - counts["tokens"] / counts["positions"],
    }


def count_tokens(lengths: Lengths, rows: Sequence[tuple[int, ...]], layout: Layout) -> dict[str, float]:
    """Tokens (image tokens included), learned tokens, images and positions of a batch, over all processes."""
    samples = [index for row in rows for index in row]
    return {
        "tokens": int(lengths.tokens[samples].sum()),
        "learned": int(lengths.targets[samples].sum()),
        "images": int(lengths.images[samples].sum()),
        "positions": layout.batch_rows * layout.max_length,
    }
