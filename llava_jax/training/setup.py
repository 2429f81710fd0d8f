"""The set-up of a run: all that is known before its parameters are loaded, then the parameters and the state."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llava_jax.checkpoint.format import DESCRIPTION, Description, read_description, write_description
from llava_jax.checkpoint.reading import Checkpoint
from llava_jax.checkpoint.training import TrainingCheckpoints
from llava_jax.checkpoint.writing import copy_tokenizer
from llava_jax.cli import UserError
from llava_jax.data.pipeline import Batch, Batches, ImageDecoder
from llava_jax.data.plan import Order
from llava_jax.evaluate.in_training import Evaluation
from llava_jax.models import pieces
from llava_jax.models.llava import NEWLINE_PARAMETER, Params, Shapes, used_params
from llava_jax.parallel import distributed, sharding
from llava_jax.training import adapters, builder
from llava_jax.training.builder import TrainingProgram
from llava_jax.training.data import RunData, prepare_data
from llava_jax.training.goodput import Goodput
from llava_jax.training.start import Start, find_start
from llava_jax.training.step import TrainState
from llava_jax.training.workdir import claim, fingerprint, set_aside


@dataclasses.dataclass(frozen=True)
class Run:
    """A run before its parameters are loaded."""

    config: ConfigDict
    workdir: epath.Path
    start: Start
    data: RunData
    benchmark: Evaluation | None  # the questions to answer while training, if any
    program: TrainingProgram
    description: Description  # what its checkpoints say about themselves

    @property
    def steps(self) -> int:
        return self.data.steps

    @property
    def mesh(self) -> Mesh:
        return self.program.settings.mesh

    def batches(self, order: Order) -> Batches:
        """The batches of an order, of which this process reads the groups that its own devices take."""
        model, layout = self.start.model, self.data.layout
        fields = (model.image_aspect, model.image_mean, model.image_resample, model.tiling)
        decode = ImageDecoder(layout.image_size, *fields)
        lengths = self.data.lengths if model.tiling else None
        groups = sharding.local_groups(self.mesh, layout.groups)
        return Batches(self.data.encoded, decode, order, layout, groups, lengths)

    def put(self, batch: Batch) -> dict[str, jax.Array]:
        """Transfers a batch to the devices."""
        return sharding.put_batch(self.mesh, self.data.layout.groups, batch)


def set_up(config: ConfigDict, workdir: epath.Path, resume_from: int | None) -> Run:
    """Finds what to start from, prepares data and program, and claims the workdir, in which nothing is written before.

    Raises UserError for what the user can mend.
    """
    mesh = sharding.make_mesh(config.mesh.to_dict())
    start = find_start(config, workdir, resume_from)
    data = prepare_data(config, start)
    benchmark = None
    if config.evaluate.benchmark:
        benchmark = Evaluation(config, start.model, data.encoded.encode.tokenizer, start.template)
    stored = start.source.abstract()
    partly_used = stored.keys() - used_params(start.model, stored).keys()  # earlier versions trained them whole
    old = start.resumed and not partly_used.isdisjoint(start.source.stored)
    program = builder.build(config, start.model, data.layout, mesh, data.steps, stored, trains_unused=old)
    if absent := program.frozen.keys() & {NEWLINE_PARAMETER} - stored.keys():
        raise UserError(
            f"{start.source.root}: has no {absent.pop()}, and the run does not train it: train it in stage 2, or add "
            f"({NEWLINE_PARAMETER!r}, 'llm') to config.trainable"
        )
    description = _claim_workdir(config, workdir, start, data, program.frozen)
    return Run(config, workdir, start, data, benchmark, program, description)


def _claim_workdir(
    config: ConfigDict, workdir: epath.Path, start: Start, data: RunData, frozen: Iterable[str]
) -> Description:
    """Process 0 makes the workdir this run's; returns the description of its checkpoints, which all processes read."""
    if distributed.is_first():
        claim(workdir, config, fingerprint(data.encoded.source, data.lengths))
        description = start.source.description if start.resumed else _describe(config, workdir, start, frozen)
    distributed.barrier("workdir")
    if distributed.is_first():
        return description
    if not (workdir / DESCRIPTION).exists():
        raise UserError(
            f"{workdir}: what process 0 wrote there cannot be seen by process {jax.process_index()}: the workdir has "
            "to be on a file system that all hosts share, such as gs:// or NFS"
        )
    return read_description(workdir)


def _describe(config: ConfigDict, workdir: epath.Path, start: Start, frozen: Iterable[str]) -> Description:
    """Writes the tokenizer and the description of a new run."""
    source = start.source
    description = Description(
        model=start.model,
        template=config.template,
        hf=source.description.hf,
        sources=source.sources_of(list(frozen), workdir),
        stage=config.stage,
    )
    copy_tokenizer(source.tokenizer_dir, workdir / "tokenizer")
    write_description(workdir, description)
    return description


# ----------------------------------------------------------------------------------------------- parameters and state


def load(run: Run, checkpoints: TrainingCheckpoints, goodput: Goodput) -> tuple[TrainState, Params]:
    """The state to train and the frozen parameters. Step 0 is saved: a full disk or a wrong path fails now."""
    start, program = run.start, run.program
    _require_same_step(run.workdir, start)
    frozen = _load_parameters(start.source, program.frozen)
    if not start.resumed:
        trainable = _first_parameters(run, frozen)
        state = builder.init_state(program.optimizer, trainable, run.mesh, ema=bool(run.config.ema))
        with goodput.measure("checkpoint"):
            checkpoints.save(0, *state[1:], wait=True)
        return state, frozen
    restored = checkpoints.restore(start.step, *program.state[1:])
    step = jax.device_put(jnp.int32(start.step), program.state.step.sharding)
    if distributed.is_first() and start.goes_back:
        set_aside(run.workdir, start.step)  # only now that the step could be read
    distributed.barrier("set aside")
    checkpoints.reload()
    return TrainState(step, *restored), frozen


def _first_parameters(run: Run, frozen: Params) -> Params:
    """The trained parameters of step 0: those of the checkpoint, and adapters that it does not have."""
    source, like = run.start.source, run.program.state.trainable
    held = source.abstract()
    new = {name: leaf for name, leaf in like.items() if pieces.whole(name) not in held}
    loaded = _load_parameters(source, {name: leaf for name, leaf in like.items() if name not in new})
    if new:
        loaded |= adapters.fresh(run.start.model, new, jax.random.key(run.config.seed), frozen | loaded)
    return {name: loaded[name] for name in like}


def _load_parameters(source: Checkpoint, like: Shapes) -> Params:
    """Parameters of a checkpoint, each in the type and with the sharding of its entry in `like`."""
    return source.load(like, lambda name, stored: like[name].dtype, lambda name: like[name].sharding)


def _require_same_step(workdir: epath.Path, start: Start) -> None:
    """Raises UserError if the processes see different steps to resume from, or some of them none."""
    step = start.step if start.resumed else -1
    seen = {int(value[0]) for value in distributed.gather("start", np.array([step]))}
    if len(seen) > 1:
        raise UserError(
            f"{workdir}: the processes see different checkpoints there (steps {sorted(seen)}): the workdir has to be "
            "on a file system that all hosts share, such as gs:// or NFS"
        )
