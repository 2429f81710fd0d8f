"""What a run trains, as a table of parameter names, and how: an optimizer and a schedule for each group of them.

`config.trainable` is that table or, if it is empty, the stage's own. Everything else follows from the names it matches:
what is frozen, the optimizer's groups, FLOPs, the run summary and preflight.
"""

import difflib
import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llava_jax.cli import UserError
from llava_jax.models import pieces
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import NEWLINE_PARAMETER, abstract_params
from llava_jax.training.optimizers import OPTIMIZERS
from llava_jax.training.schedules import learning_rate

# Stage -> the parts of the model that it trains.
STAGES: dict[str, tuple[str, ...]] = {"pretrain": ("projector",), "finetune": ("projector", "llm", "newline")}
# The same with LoRA.
LORA_STAGES: dict[str, tuple[str, ...]] = {"finetune": ("projector", "lora")}
PATTERNS = {
    "projector": r"projector\.",
    "llm": r"llm\.",
    "newline": NEWLINE_PARAMETER,
    "lora": r".+\.lora\.",
    "vision": r"vision\.",
}
OPTIONAL = ("newline",)  # what only some models have
# Group -> the option that, unless it is 0, is its learning rate instead of `learning_rate`.
RATES = {"projector": "projector_learning_rate", "vision": "vision_learning_rate", "llm": "", "lora": "", "newline": ""}


class Group(NamedTuple):
    """Parameters that are trained alike. `label` is its key in the optimizer's state."""

    label: str
    pattern: str  # matches the beginning of a parameter's name
    learning_rate: float  # at its peak
    weight_decay: float
    layers: str = ""  # of the stacks that the pattern matches, as the slice "16:"; "" is everything it matches
    layer_decay: float = 1.0  # see `layer_scales`


def groups(config: ConfigDict) -> tuple[Group, ...]:
    """The table of what a run trains, in order of precedence."""
    if config.trainable:
        return tuple(_group(config, number, *entry(each)) for number, each in enumerate(config.trainable, 1))
    stages = LORA_STAGES if config.lora.rank else STAGES
    if config.stage not in stages:
        raise UserError(f"config.stage is {config.stage!r}, not one of {', '.join(stages)}")
    return tuple(Group(part, PATTERNS[part], _rate(config, part), config.weight_decay) for part in stages[config.stage])


def entry(value: Any) -> tuple[str, Any]:
    """An entry of `config.trainable` as (pattern, group or dict of options). Both spellings mean the same."""
    if isinstance(value, Mapping):
        return value["parameters"], {key: option for key, option in value.items() if key != "parameters"}
    pattern, options = value
    return pattern, options


def _group(config: ConfigDict, number: int, pattern: str, options: str | Mapping[str, Any]) -> Group:
    if isinstance(options, str):
        options = {"learning_rate": _rate(config, options)}
    defaults = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}
    return Group(f"group_{number}", pattern, **defaults | dict(options))


def _rate(config: ConfigDict, group: str) -> float:
    return RATES[group] and config[RATES[group]] or config.learning_rate


def trained(shapes: Mapping[str, Any], config: ConfigDict) -> dict[str, Group]:
    """The group of each parameter that is trained: the first whose pattern matches its name.

    Where only some layers of a stack are in a group, each leaf of the stack is split there: see `models.pieces`.

    Args:
      shapes: the parameters that may be trained, anything with a shape, by name.

    Raises UserError for a pattern that is the first to match no parameter, or layers that no stack has.
    """
    table = groups(config)
    layers = {(group, stack): pair for group in table if group.layers for stack, pair in _layers(group, shapes).items()}
    cuts: dict[str, set[int]] = {}
    for (_, stack), pair in layers.items():
        cuts.setdefault(stack, set()).update(pair)
    parameters = pieces.split(shapes, cuts)

    def matches(group: Group, name: str) -> bool:
        if not re.match(group.pattern, pieces.whole(name)):
            return False
        start, stop = layers.get((group, pieces.stack_of(name)), (0, 0))
        return not group.layers or start <= pieces.rows(name, parameters[name])[0] < stop

    found = {name: next((group for group in table if matches(group, name)), None) for name in parameters}
    for group in table:
        if group not in found.values() and group.label not in OPTIONAL:
            matching = sum(matches(group, name) for name in parameters)
            reason = f"all {matching} parameters that it matches are those of earlier patterns"
            raise _trains_nothing(group, reason if matching else _no_parameter(group, shapes))
    for name, group in found.items():
        adapter = f"{pieces.whole(name).removesuffix('.kernel')}.lora.a"
        if group and config.trainable and name.endswith(".kernel") and adapter in shapes:
            raise UserError(
                f"config.trainable: the pattern {group.pattern} trains {pieces.whole(name)} itself, beside its adapter "
                f"(config.lora.rank): put that of the adapters there instead, ({PATTERNS['lora']!r}, 'lora')"
            )
    return {name: group for name, group in found.items() if group}


def _layers(group: Group, shapes: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Of each stack that a group's pattern matches, the layers that it trains: (first, last + 1)."""
    depths: dict[str, int] = {}
    for name, leaf in shapes.items():
        if (stack := pieces.stack_of(name)) and re.match(group.pattern, pieces.whole(name)):
            depths[stack] = max(depths.get(stack, 0), pieces.rows(name, leaf)[1])
    if not depths:
        raise _trains_nothing(
            group, f"it has layers {group.layers!r}, and {_no_parameter(group, shapes, stacked=True)}"
        )
    found = {}
    for stack, depth in depths.items():
        first, last = group.layers.split(":")
        start, stop = (bound + depth * (bound < 0) for bound in (int(first or 0), int(last or depth)))
        if not 0 <= start < stop <= depth:
            raise UserError(
                f"config.trainable: the pattern {group.pattern} has layers {group.layers!r}, and {stack} has {depth} "
                f"that are used: 0:{depth} is all of them, -1: the last"
            )
        found[stack] = start, stop
    return found


def _no_parameter(group: Group, shapes: Mapping[str, Any], stacked: bool = False) -> str:
    names = [pieces.whole(name) for name in shapes if not stacked or pieces.stack_of(name)]
    examples = [next(part) for _, part in itertools.groupby(names, key=lambda name: name.partition(".")[0])]
    nearest = difflib.get_close_matches(group.pattern.replace("\\", ""), names, n=1, cutoff=0.0)[0]
    return (
        f"it matches no {'layers' if stacked else 'parameter'}; the nearest is {nearest}, "
        f"their names are like {', '.join(examples)}"
    )


def _trains_nothing(group: Group, reason: str) -> UserError:
    return UserError(f"config.trainable: the pattern {group.pattern} trains nothing: {reason}")


def layer_scales(chosen: Mapping[str, Group], model: LlavaConfig) -> dict[str, np.ndarray]:
    """Factors of the learning rates of parameters in groups with a `layer_decay` d, float32, by name.

    d^(L - l) for layer l of L, where layers after the one whose features are used do not count: 1 for the last, d^L for
    the embeddings before the first, 1 for what follows. So do BEiT (Bao et al. 2021) and ViTDet (Li et al. 2022), whose
    last layer, below a new head, has d.
    """
    depths = {"vision.layers": model.vision_layers_used, "llm.layers": model.text.num_layers}

    def scale(name: str, decay: float) -> np.ndarray:
        if stack := pieces.stack_of(name):
            start, stop = pieces.rows(name, shapes[pieces.whole(name)])
            return np.float32(decay) ** np.maximum(depths[stack] - 1 - np.arange(start, stop, dtype=np.float32), 0)
        before = pieces.BEFORE_LAYERS.match(name)
        return np.float32(decay) ** np.float32(depths[f"{name.partition('.')[0]}.layers"] if before else 0)

    shapes = abstract_params(model)
    return {name: scale(name, group.layer_decay) for name, group in chosen.items() if group.layer_decay != 1.0}


def scale_layers(scales: Mapping[str, np.ndarray]) -> optax.GradientTransformation:
    """Multiplies updates by `layer_scales`: a number or, for a stack, one for each layer."""

    def scaled(name: str, update: jax.Array) -> jax.Array:
        scale = jnp.asarray(scales[name], update.dtype)
        return update * scale.reshape(scale.shape + (1,) * (update.ndim - scale.ndim))

    return optax.stateless(
        lambda updates, _: {name: scaled(name, u) if name in scales else u for name, u in updates.items()}
    )


def reported_rates(config: ConfigDict, steps: int) -> dict[str, optax.Schedule]:
    """The learning rates that are metrics, by name: of the stage's main part and, if it differs, of the projector; of
    `config.trainable` that of the first pattern as `learning_rate`, of the second as `learning_rate_2` and so on."""
    table = groups(config)
    if config.trainable:
        chosen = {f"learning_rate_{number}" if number > 1 else "learning_rate": g for number, g in enumerate(table, 1)}
    else:
        chosen = {"learning_rate": table[-1]}
        chosen |= {"projector_learning_rate": table[0]} if config.projector_learning_rate else {}
    return {name: learning_rate(config, group.learning_rate, steps) for name, group in chosen.items()}


def make_optimizer(
    config: ConfigDict,
    chosen: Mapping[str, Group],  # of each trained parameter, see `trained`
    steps: int,
    scales: Mapping[str, np.ndarray] | None = None,  # factors of their learning rates, see `layer_scales`
    mesh: Mesh | None = None,  # shards them; None is for those of one device
) -> optax.GradientTransformation:
    """The optimizer of a run by group, for a dict of exactly the trained parameters, clipped by their common norm."""
    optimizer = OPTIMIZERS.find(config.optimizer)
    by_group = {
        group.label: optimizer.make(config, learning_rate(config, group.learning_rate, steps), group.weight_decay, mesh)
        for group in groups(config)
        if group in chosen.values()
    }
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    updates = optax.partition(by_group, {name: group.label for name, group in chosen.items()})
    return optax.chain(clip, updates, *([scale_layers(scales)] if scales else []))
