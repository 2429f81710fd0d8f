"""Optimizers: those of torch on equal gradients, and how they treat stacks; their state; moving averages; resuming."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from etils import epath
from orbax.checkpoint import v1 as ocp
from training_runs import copied, final, metrics, run_config

from configs import common
from llava_jax.cli import UserError
from llava_jax.models.config import LoraConfig
from llava_jax.models.llava import abstract_params
from llava_jax.preflight import compile, targets
from llava_jax.training import config_check, loop, optim
from llava_jax.training.optimizers import OPTIMIZERS

# A stack of matrices and one matrix, wide and tall; vectors; tables that are no matrices to Muon.
SHAPES = {
    "llm.layers.mlp.up_proj.kernel": (2, 6, 10),
    "llm.layers.self_attn.q_proj.lora.a": (2, 10, 4),
    "llm.layers.input_layernorm.scale": (2, 6),
    "projector.linear_1.kernel": (8, 5),
    "projector.linear_1.bias": (5,),
    "llm.embed_tokens.embedding": (7, 6),
    "llm.lm_head.kernel": (6, 7),
}
MATRICES = {name for name in SHAPES if name.endswith(("_proj.kernel", "lora.a", "linear_1.kernel"))}
RATE, DECAY, STEPS = 0.01, 0.1, 4


def config_of(name, **options):
    config = common.get_config()
    config.update(optimizer=name, learning_rate=RATE, weight_decay=DECAY, schedule="constant", warmup_ratio=0.0)
    config.trainable = ({"parameters": ""},)
    config.update_from_flattened_dict(options)
    config_check.check(config)
    return config


def values(seed: int) -> dict[str, np.ndarray]:
    """The second layer of a stack is far larger, so that what is done to both together shows."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    for name in filter(is_stack, SHAPES):
        drawn[name][1] *= 30
    return drawn


def is_stack(name: str) -> bool:
    return ".layers." in name


def trained(config) -> dict[str, np.ndarray]:
    """The parameters after some steps."""
    optimizer = optim.make_optimizer(config, optim.trained(SHAPES, config), STEPS)
    params = jax.tree.map(jnp.asarray, values(0))
    state = optimizer.init(params)
    for step in range(STEPS):
        updates, state = jax.jit(optimizer.update)(values(1 + step), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return jax.device_get(params)


def trained_by_torch(make) -> dict[str, np.ndarray]:
    """The same, by `make(name, parameter, weight decay)`, the torch optimizer of one layer of one parameter."""

    def to_torch(x):
        return torch.tensor(x.T if x.ndim == 2 else x).contiguous()

    after = {}
    for name, first in values(0).items():
        layers = list(first) if is_stack(name) else [first]
        ours = []
        for layer, start in enumerate(layers):
            parameter = torch.nn.Parameter(to_torch(start))
            optimizer = make(name, parameter, 0.0 if name.endswith(("scale", "bias")) else DECAY)
            for step in range(STEPS):
                gradient = values(1 + step)[name]
                parameter.grad = to_torch(gradient[layer] if is_stack(name) else gradient)
                optimizer.step()
            ours.append(parameter.detach().numpy().T)
        after[name] = np.stack(ours) if is_stack(name) else ours[0]
    return after


def adamw(name, parameter, decay):
    return torch.optim.AdamW([parameter], lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)


def adafactor(name, parameter, decay):
    return torch.optim.Adafactor([parameter], lr=RATE, eps=(1e-30, 1e-3), weight_decay=decay)


def adafactor_of_transformers(name, parameter, decay):
    options = {"scale_parameter": False, "relative_step": False, "weight_decay": decay}
    return transformers.optimization.Adafactor([parameter], lr=RATE, **options)


def muon(adjust_lr_fn):
    def make(name, parameter, decay):
        if name not in MATRICES:
            return adamw(name, parameter, decay)
        return torch.optim.Muon([parameter], lr=RATE, momentum=0.95, weight_decay=decay, adjust_lr_fn=adjust_lr_fn)

    return make


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. 2023."""

    def __init__(self, parameter, decay):
        super().__init__([parameter], {"decay": decay})
        self.momentum = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        (parameter,) = group["params"]
        update = torch.sign(0.9 * self.momentum + 0.1 * parameter.grad)
        parameter -= RATE * (update + group["decay"] * parameter)
        self.momentum = 0.99 * self.momentum + 0.01 * parameter.grad


@pytest.mark.parametrize(
    "name,options,theirs",
    [
        ("adamw", {}, adamw),
        ("adafactor", {"adafactor.min_factored": 2}, adafactor_of_transformers),
        ("adafactor", {"adafactor.min_factored": 2, "adafactor.scale_parameter": True}, adafactor),
        ("lion", {}, lambda name, parameter, decay: Lion(parameter, decay)),
        ("muon", {}, muon("match_rms_adamw")),
        ("muon", {"muon.rms": 0.0}, muon("original")),
    ],
)
def test_updates_are_those_of_torch_for_each_layer(name, options, theirs, monkeypatch):
    """torch's Muon rounds to bfloat16 on the way, which is left out here."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, expected = trained(config_of(name, **options)), trained_by_torch(theirs)
    for parameter, value in expected.items():
        np.testing.assert_allclose(ours[parameter], value, rtol=1e-5, atol=1e-5, err_msg=parameter)


def test_muon_trains_all_matrices_but_tables_of_tokens():
    """Whether one was orthogonalized shows in its update: its singular values are near 1."""
    config = config_of("muon", weight_decay=0.0)
    model = tiny.config(lora=LoraConfig(rank=2, alpha=4.0, targets=("q_proj",)))
    params = {name: jnp.zeros(leaf.shape) for name, leaf in abstract_params(model).items()}
    (group,) = optim.groups(config)
    optimizer = optim.make_optimizer(config, dict.fromkeys(params, group), STEPS)
    rng = np.random.default_rng(0)
    gradients = {name: jnp.asarray(rng.normal(size=value.shape), jnp.float32) for name, value in params.items()}
    updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    orthogonal = set()
    for name, update in updates.items():
        if update.ndim - is_stack(name) == 2:
            scale = RATE * 0.2 * max(update.shape[-2:]) ** 0.5
            singular = np.linalg.svd(np.asarray(update).reshape(-1, *update.shape[-2:]), compute_uv=False) / scale
            if np.median(singular) > 0.6 and singular.max() < 1.3:
                orthogonal.add(name)
    matrices = {name for name in params if name.endswith((".kernel", "lora.a", "lora.b"))}
    assert orthogonal == matrices - {"llm.lm_head.kernel", "vision.patch_embedding.kernel"}
    moments = [path for path, _ in jax.tree.leaves_with_path(state) if "nu" in str(path)]
    assert len(moments) == len(params) - len(orthogonal)  # only the rest has AdamW's second moment


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_first_moments_are_bfloat16_if_asked_for(name):
    state = {}
    for dtype in ("", "bfloat16"):
        config = config_of(name, moment_dtype=dtype)
        state[dtype] = jax.eval_shape(
            optim.make_optimizer(config, optim.trained(SHAPES, config), STEPS).init, values(0)
        )
    whole, half = (dict(jax.tree.leaves_with_path(tree)) for tree in state.values())
    changed = {path[-1].key for path in whole if whole[path].dtype != half[path].dtype}
    assert changed == set(SHAPES) and {leaf.dtype.name for leaf in half.values()} <= {"bfloat16", "float32", "int32"}
    exact, rounded = trained(config_of(name)), trained(config_of(name, moment_dtype="bfloat16"))
    start = values(0)
    moved, off = (
        sum(np.abs(one[n] - other[n]).sum() for n in start) for one, other in ((exact, start), (exact, rounded))
    )
    assert off < 0.02 * moved


def test_what_an_optimizer_does_not_know_is_refused():
    for name, options, message in (
        (
            "adam",
            {},
            "config.optimizer=adam: is no such optimizer; did you mean adamw. choose from adamw, adaf",
        ),
        ("lion", {"beta2": 0.95}, "config.beta2 is 0.95, which is for optimizer adamw or muon, not lion"),
        ("adamw", {"muon.rms": 0.1}, "config.muon.rms is 0.1, which is for optimizer muon, not adamw"),
        (
            "adafactor",
            {"moment_dtype": "bfloat16"},
            "which is for optimizer adamw or lion or muon, not adaf",
        ),
        ("adamw", {"ema": 1.0}, "config.ema is 1.0: it has to be below 1"),
    ):
        with pytest.raises(UserError, match=message):
            config_of(name, **options)


def test_a_misspelt_optimizer_ends_a_run_before_its_workdir(world, tmp_path):
    with pytest.raises(UserError, match="did you mean muon"):
        loop.train(run_config(world, optimizer="muom"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------- runs


def test_preflight_counts_the_state_of_an_optimizer_and_the_average(world):
    """Bytes of the state a trained parameter; of AdamW without an average 8."""

    def program(**changes):
        config = run_config(world, image_slots=1, label_slots=64, **changes)
        return compile.build(config, targets.parse("cpu"))

    adamw = program()
    trained = sum(leaf.size for leaf in adamw.training.state.trainable.values())

    def added(**changes):
        return 8 + (compile.state_bytes(program(**changes)) - compile.state_bytes(adamw)) / trained

    assert added(ema=0.9) == pytest.approx(12, abs=0.01)
    assert added(optimizer="lion") == pytest.approx(4, abs=0.01)
    assert added(optimizer="lion", moment_dtype="bfloat16", ema=0.9) == pytest.approx(6, abs=0.01)
    assert 4 < added(optimizer="muon") < 7  # the tables of this small model are large
    config = run_config(world, optimizer="adafactor")
    config.adafactor.min_factored = 2
    assert added(optimizer="adafactor") == pytest.approx(4, abs=0.05)  # no matrix is as wide as 128
    assert added(optimizer="adafactor", adafactor=config.adafactor) < 0.4


def held(workdir, step):
    """All arrays of a step: parameters, optimizer, moving average."""
    loaded = ocp.load_checkpointables(epath.Path(workdir) / "checkpoints" / str(step))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(loaded)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_bit_equal(name, world, tmp_path):
    changes = {"moment_dtype": "bfloat16"} if name in ("lion", "muon") else {}
    config = run_config(world, steps=4, optimizer=name, ema=0.9, save_every=2, keep=9, weight_decay=0.1, **changes)
    loop.train(config, str(tmp_path / "run"))
    killed = copied(tmp_path / "run", tmp_path / "killed")
    shutil.rmtree(killed / "checkpoints" / "4")
    loop.train(config, str(killed))
    expected, found = held(tmp_path / "run", 4), held(killed, 4)
    assert expected.keys() == found.keys() and any("ema" in key for key in expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    assert [line["loss"] for line in metrics(killed)] == [line["loss"] for line in metrics(tmp_path / "run")]


def test_the_average_is_that_of_the_weights_and_is_what_is_evaluated_and_read(world, tmp_path):
    plain, averaged, after = (tmp_path / name for name in ("plain", "averaged", "after"))
    changes = {"steps": 3, "save_every": 1, "keep": 9, "learning_rate": 1e-2, "data.holdout": 4}

    def config(**more):
        found = run_config(world).copy_and_resolve_references().unlock()
        found.update_from_flattened_dict(changes | more)
        return found

    loop.train(config(), str(plain))
    loop.train(config(ema=0.75), str(averaged))
    losses = {workdir: {m["step"]: m["loss"] for m in metrics(workdir) if "loss" in m} for workdir in (plain, averaged)}
    assert losses[plain] == losses[averaged]  # the average has no part in training
    assert not any("ema" in key for key in held(plain, 3))
    weights, read = [held(averaged, step) for step in range(4)], final(averaged)
    for key in filter(lambda key: "params" in key, weights[0]):
        expected = weights[0][key]
        for now in weights[1:]:
            expected = 0.75 * expected + 0.25 * now[key]
        np.testing.assert_allclose(read[key.split("'")[3]], expected, rtol=1e-6, atol=1e-7, err_msg=key)
    # A run that starts from it starts from the average, on which the validation loss was computed.
    loop.train(config(init=str(averaged), steps=1, learning_rate=0.0), str(after))
    validation = [next(m["validation_loss"] for m in metrics(d) if "validation_loss" in m) for d in (averaged, after)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-6)
    assert validation[0] != pytest.approx(next(m["validation_loss"] for m in metrics(plain) if "validation_loss" in m))
