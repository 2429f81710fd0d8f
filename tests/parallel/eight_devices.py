"""Every mesh trains the same model, and answers alike. Run by tests/parallel/test_meshes.py with eight fake devices."""

import dataclasses
import functools
import gc
import re

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from training_runs import make_config, random_batches, settings_for

from llava_jax.checkpoint.format import Description
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.checkpoint.training import TrainingCheckpoints
from llava_jax.inference.adapters import AdapterWeights
from llava_jax.inference.engine import Engine
from llava_jax.inference.requests import Request, Sampling
from llava_jax.models.config import LoraConfig, TextConfig, VisionConfig
from llava_jax.models.execution import REMAT_POLICIES
from llava_jax.models.families.gemma3_text import Gemma3Config
from llava_jax.models.llava import abstract_params, module_params
from llava_jax.parallel import sharding
from llava_jax.preflight import hlo_cost
from llava_jax.training import builder, optim
from llava_jax.training import step as training_step
from llava_jax.training.adapters import adapted

STEPS = 8  # Adam amplifies the rounding of small gradients, so that meshes part with each step
MESHES = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 4, 2), (1, 2, 4), (1, 1, 4)]
MODEL = tiny.config(
    vision=VisionConfig(32, 64, 3, 4, image_size=16, patch_size=8),
    text=TextConfig(tiny.VOCAB, 48, 96, 2, 8, 4, 8, qkv_bias=True),
)

# Adapters of the decoder and of the tower, beside the whole projector: of kernels whose inputs, whose outputs and whose
# fewer heads are split. Each is half a second of the compiler.
TARGETS = (r"llm\..*\.(q|k|o|up|down)_proj", r"vision\.layers\..*(fc1|out_proj)")
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.2, "targets": TARGETS}
LORAS = {"lora": LORA, "dora": LORA | {"dora": True, "rslora": True}}
EVERY_KERNEL = (r".*_proj", r"vision\.layers\..*")

LAYER = re.compile(r"(vision|llm)\.layers\..+\.kernel")


def mesh_of(sizes: tuple[int, int, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[: np.prod(sizes)])


def on(mesh, params):
    return {name: jax.device_put(v, sharding.param_sharding(mesh, name, v.shape)) for name, v in params.items()}


def start(stage: str, mesh, model, config, ema: bool = False):
    """Optimizer, state and frozen parameters on a mesh."""
    params = tiny.params(dataclasses.replace(model, base_dtype=""))
    if model.base_dtype:
        params = tiny.quantized_params(params, model)
    names = optim.trained(params, config)
    optimizer = optim.make_optimizer(config, names, STEPS, mesh=mesh)
    trainable = on(mesh, {name: params[name] for name in names})
    frozen = on(mesh, {name: value for name, value in params.items() if name not in trainable})
    return optimizer, builder.init_state(optimizer, trainable, mesh, ema), frozen


def train_steps(stage: str, mesh, model=MODEL, **changes):
    """(gradients of the first step, losses, weights and, in stage "all", their moving average) as numpy."""
    config = make_config("pretrain" if stage == "pretrain" else "finetune", learning_rate=1e-2, weight_decay=0.1)
    if stage == "all":
        config.trainable = ({"parameters": ""},)
    config.lora.rank = model.lora.rank if model.lora else 0
    if stage in LORAS:
        config.lora.update(LORAS[stage])
        config.learning_rate = 3e-2
        model = adapted(model, config)
    ema = 0.5 if stage == "all" else 0.0
    optimizer, state, frozen = start(stage, mesh, model, config, bool(ema))
    (batch,) = random_batches(model, 1, rows=16)
    settings = settings_for(model, batch, mesh=mesh, ema=ema, **changes)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    step = builder.jit_step(settings, optimizer, state)
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        if number == 0:  # Adam's first moment is (1 - beta1) of it
            gradients = {name: moment / (1 - config.beta1) for name, moment in first_moments(state.optimizer).items()}
    averages = {f"ema.{name}": value for name, value in (state.ema or {}).items()}
    return gradients, losses, jax.device_get(state.trainable | averages)


def first_moments(optimizer_state) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(optimizer_state)
    is_moment = jax.tree_util.GetAttrKey("mu")
    return {path[-1].key: jax.device_get(leaf) for path, leaf in leaves if is_moment in path}


@functools.cache
def one_device(stage: str):
    return train_steps(stage, mesh_of((1, 1, 1)))


def assert_gradients_agree(run, reference) -> None:
    (gradients, losses, _), (expected_gradients, expected_losses, _) = run, reference
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert expected_losses[-1] < 0.995 * expected_losses[0], "nothing was learned: equal losses would say little"
    assert gradients.keys() == expected_gradients.keys()
    largest = max(np.abs(gradient).max() for gradient in expected_gradients.values())
    for name, expected in expected_gradients.items():
        np.testing.assert_allclose(gradients[name], expected, rtol=0, atol=1e-5 * largest, err_msg=name)


def assert_agrees(run, reference) -> None:
    assert_gradients_agree(run, reference)
    weights, expected_weights = run[2], reference[2]
    off = sum(np.sum((weights[name] - expected) ** 2) for name, expected in expected_weights.items())
    norm = sum(np.sum(expected**2) for expected in expected_weights.values())
    assert (off / norm) ** 0.5 < 1e-5


@pytest.mark.parametrize(
    "sizes,stage",
    [*((sizes, "finetune") for sizes in MESHES), *((sizes, "pretrain") for sizes in MESHES[1:4:2])],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_every_mesh_trains_as_one_device_does(sizes, stage):
    assert_agrees(train_steps(stage, mesh_of(sizes)), one_device(stage))


@pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 2, 4)], ids=lambda sizes: "x".join(map(str, sizes)))
def test_a_trained_tower_and_the_average_are_sharded_like_the_decoder(sizes):
    assert_agrees(train_steps("all", mesh_of(sizes), remat="full"), one_device("all"))


@pytest.mark.parametrize("sizes,remat", [((2, 4, 1), "full"), ((1, 4, 2), "save_qkv")])
def test_rematerialised_accumulated_and_chunked(sizes, remat):
    changes = {"remat": remat, "attention": "chunked", "accumulation": 2}
    assert_agrees(train_steps("finetune", mesh_of(sizes), **changes), one_device("finetune"))


def test_layers_that_see_different_windows():
    text = Gemma3Config(
        tiny.VOCAB, 48, 96, 3, 8, 4, 8, sliding_window=4, global_every=2, family="gemma3_text", tie_word_embeddings=True
    )
    model = tiny.config(vision=MODEL.vision, text=text)
    changes = {"remat": "save_qkv", "attention": "chunked", "accumulation": 2}
    sharded = train_steps("finetune", mesh_of((1, 4, 2)), model, **changes)
    assert_gradients_agree(sharded, train_steps("finetune", mesh_of((1, 1, 1)), model))


@pytest.mark.parametrize(
    "stage,sizes,remat,accumulation",
    [("dora", (1, 8, 1), "none", 1), ("dora", (1, 2, 4), "full", 4), ("dora", (2, 4, 1), "full", 2)]
    + [("lora", (1, 4, 2), "save_qkv", 2)],
)
def test_adapters_train_on_every_mesh_as_on_one_device(stage, sizes, remat, accumulation):
    """With the same inputs dropped."""
    changes = {"remat": remat, "accumulation": accumulation}
    assert_agrees(train_steps(stage, mesh_of(sizes), **changes), one_device(stage))


def test_adapters_are_sent_in_the_type_of_the_computation():
    """Gathered in bfloat16 like the kernels, their gradients scattered likewise; the masters are float32."""
    mesh, config = mesh_of((1, 8, 1)), make_config("finetune")
    config.lora.update(LORAS["dora"] | {"targets": EVERY_KERNEL})
    model = adapted(MODEL, config)
    _, state, frozen = start("dora", mesh, model, config)
    (batch,) = random_batches(model, 1, rows=16)
    settings = settings_for(model, batch, mesh=mesh, dtype=jnp.bfloat16)
    step = jax.jit(functools.partial(training_step.loss_and_gradients, settings))
    text = step.lower(state.trainable, frozen, batch).as_text()
    for operation in ("all_gather", "reduce_scatter"):
        sent = re.findall(rf'"stablehlo\.{operation}".*?: \(tensor<([\dx]+)x(\w+)>\)', text, re.DOTALL)
        adapters = [kind for shape, kind in sent if "4" in shape.split("x")[-2:]]
        assert len(adapters) >= 7 * 2 and set(adapters) == {"bf16"}, sent
        assert {kind for _, kind in sent} <= {"bf16", "i32"}, sent
    assert {leaf.dtype.name for leaf in jax.eval_shape(step, state.trainable, frozen, batch)[1].values()} == {"float32"}
    assert {leaf.dtype.name for leaf in state.trainable.values()} == {"float32"}


def test_rows_without_pictures_are_accumulated_too():
    mesh = mesh_of((1, 2, 1))
    _, state, frozen = start("finetune", mesh, MODEL, make_config("finetune"))
    (batch,) = random_batches(MODEL, 1, rows=8)
    batch["image_feature_index"][:] = -1
    batch["images"] = batch["images"][:, :0]
    losses = [
        jax.jit(training_step.loss_and_gradients, static_argnums=0)(
            settings_for(MODEL, batch, mesh=mesh, accumulation=accumulation), state.trainable, frozen, batch
        )[0]
        for accumulation in (1, 2)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_rings_of_a_torus(monkeypatch):
    monkeypatch.setattr(sharding, "position", lambda device: (0, device.id // 4, device.id // 2 % 2, device.id % 2, 0))
    mesh = mesh_of((2, 4, 1))
    assert [mesh.shape[axis] for axis in mesh.axis_names] == [2, 1, 1, 2, 2, 1, 1]
    assert_agrees(train_steps("finetune", mesh), one_device("finetune"))


def test_a_checkpoint_of_one_mesh_restores_on_another(tmp_path):
    """Into shapes with shardings: nothing but the state is made, and a step donates all of it."""
    description = Description(MODEL, "v1", stage="finetune")
    config = make_config("finetune")
    optimizer, saved, _ = start("finetune", mesh_of((1, 8, 1)), MODEL, config)
    saved = saved._replace(trainable=jax.tree.map(lambda x: x + 1, saved.trainable))
    checkpoints = TrainingCheckpoints(tmp_path, description, keep=1)
    checkpoints.save(3, *saved[1:], wait=True)
    values = jax.device_get(saved)
    del saved
    for sizes in ((2, 2, 2), (2, 4, 1)):
        mesh = mesh_of(sizes)
        _, fresh, frozen = start("finetune", mesh, MODEL, config)
        like = builder.abstract_state(optimizer, tiny.params(MODEL), fresh.trainable, mesh)
        assert jax.tree.map(lambda leaf: leaf.sharding, like) == jax.tree.map(lambda leaf: leaf.sharding, fresh)
        del fresh
        restored = checkpoints.restore(3, *like[1:])
        state = training_step.TrainState(jax.device_put(3, like.step.sharding), *restored)
        assert live_bytes() == sum(leaf.nbytes for leaf in jax.tree.leaves((state, frozen)))
        leaves = (jax.tree.leaves(tree) for tree in (state, like, values._replace(step=3)))
        for restored, shape, value in zip(*leaves, strict=True):
            assert (restored.sharding, restored.dtype, restored.shape) == (shape.sharding, shape.dtype, shape.shape)
            np.testing.assert_array_equal(restored, value)
        (batch,) = random_batches(MODEL, 1, rows=16)
        step = builder.jit_step(settings_for(MODEL, batch, mesh=mesh), optimizer, like)
        given = jax.tree.leaves(state)
        state, _ = step(state, frozen, jax.device_put(batch, sharding.batch_sharding(mesh)))
        assert all(leaf.is_deleted() for leaf in given)
    checkpoints.close()


QUANTIZED = tiny.config(
    text=TextConfig(tiny.VOCAB, 256, 512, 2, 8, 4, 32), lora=LoraConfig(4, 8.0, (r"llm\.layers\..*\.(q|o|down)_proj",))
)


@functools.cache
def quantized_on_one_device(base_dtype: str):
    return train_steps("finetune", mesh_of((1, 1, 1)), dataclasses.replace(QUANTIZED, base_dtype=base_dtype))


@pytest.mark.parametrize("base_dtype,sizes", [("nf4", (1, 2, 4)), ("int8", (2, 4, 1))], ids=str)
def test_adapters_of_a_quantized_base(base_dtype, sizes):
    """The codes are sharded in whole blocks, and gathered as codes."""
    model, mesh = dataclasses.replace(QUANTIZED, base_dtype=base_dtype), mesh_of(sizes)
    run, reference = train_steps("finetune", mesh, model, remat="full"), quantized_on_one_device(base_dtype)
    assert_gradients_agree(run, reference)

    config = make_config("finetune")
    config.lora.rank = 4
    _, state, frozen = start("finetune", mesh, model, config)
    for name, leaf in frozen.items():
        if name.endswith((".codes", ".absmax")):
            shard = leaf.addressable_shards[0].data.shape
            assert np.prod(shard) * sizes[1] * sizes[2] == leaf.size, name
            assert base_dtype == "int8" or name.endswith("absmax") or shard[-2] % 32 == 0
    (batch,) = random_batches(model, 1, rows=16)
    jaxpr = jax.make_jaxpr(training_step.loss_and_gradients, static_argnums=0)(
        settings_for(model, batch, mesh=mesh, remat="full"), state.trainable, frozen, batch
    )
    gathered = re.findall(r"(\w+)\[([\d,]+)\] = all_gather\[", str(jaxpr))
    kernels = {tuple(map(int, dims.split(","))) for dtype, dims in gathered if dtype in ("u8", "i8")}
    assert (256 if base_dtype == "int8" else 128, 512) in kernels
    in_floats = {tuple(map(int, dims.split(","))) for dtype, dims in gathered if dtype.startswith(("f", "bf"))}
    assert not any(shape[-2:] in ((256, 512), (512, 256), (256, 128)) for shape in in_floats), in_floats


def test_kernels_are_quantized_alike_on_every_mesh(tmp_path):
    """From a plain checkpoint, whose kernels are quantized as they are read, and the other way round."""
    checkpoint = open_checkpoint(tiny.checkpoint(tmp_path, dataclasses.replace(QUANTIZED, lora=None))).quantized("nf4")
    expected = jax.device_get(checkpoint.load())
    back = jax.device_get(checkpoint.dequantized().load())
    shapes = abstract_params(checkpoint.config) | checkpoint.dequantized().abstract()
    mesh = mesh_of((1, 4, 2))

    def place(name):
        return sharding.param_sharding(mesh, name, shapes[name].shape)

    found = checkpoint.load(sharding=place)
    for name, value in expected.items():
        assert found[name].sharding == place(name), name
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    for name, value in checkpoint.dequantized().load(sharding=place).items():
        assert value.sharding == place(name), name
        np.testing.assert_allclose(value, back[name], rtol=2.0**-22, atol=1e-8, err_msg=name)


@functools.cache
def optimized(name: str, sizes: tuple[int, int, int]):
    """The losses and the state of a run with an optimizer of this name, and its compiled step."""
    config = make_config("finetune", optimizer=name, learning_rate=1e-3 if name == "lion" else 1e-2, weight_decay=0.1)
    if name == "adafactor":
        config.adafactor.min_factored = 2
    mesh = mesh_of(sizes)
    optimizer, state, frozen = start("finetune", mesh, MODEL, config, ema=True)
    (batch,) = random_batches(MODEL, 1, rows=16)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    step = builder.jit_step(settings_for(MODEL, batch, mesh=mesh, ema=0.5), optimizer, state)
    compiled = step.lower(state, frozen, batch).compile()
    losses = []
    for _ in range(STEPS):
        state, metrics = compiled(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses, state, compiled


@pytest.mark.parametrize(
    "name,sizes",
    [("adafactor", (2, 2, 2)), ("muon", (2, 2, 2)), ("muon", (1, 8, 1))],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_every_optimizer_and_the_average_train_as_on_one_device_sharded_like_the_parameters(name, sizes):
    losses, state, _ = optimized(name, sizes)
    expected_losses, expected, _ = optimized(name, (1, 1, 1))
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
    assert expected_losses[-1] < 0.995 * expected_losses[0]
    for ours, theirs in ((state.trainable, expected.trainable), (state.ema, expected.ema)):
        off = sum(np.sum((np.asarray(ours[n]) - np.asarray(theirs[n])) ** 2) for n in theirs)
        assert (off / sum(np.sum(np.asarray(value) ** 2) for value in theirs.values())) ** 0.5 < 1e-3
    moments = jax.tree.leaves_with_path((state.ema, state.optimizer))
    like = [(leaf, state.trainable[key.key]) for path, leaf in moments for key in path if str(key)[2:-2] in state.ema]
    of_same_shape = [(leaf, value) for leaf, value in like if leaf.shape == value.shape]
    assert len(of_same_shape) > len(state.ema)
    assert all(leaf.sharding == value.sharding for leaf, value in of_same_shape)


def test_matrices_are_orthogonalized_without_gathering_them():
    """Two all-to-alls for each of nine stacks and matrices, more than the model has itself; nothing else is sent."""

    def sent(name: str) -> dict[str, int]:
        rows = hlo_cost.cost(optimized(name, (1, 8, 1))[2].as_text()).by_kind()
        return {f"{row['kind']} {row['dtype']}": row["count"] for row in rows}

    lion, muon = sent("lion"), sent("muon")
    assert muon == lion | {"all-to-all f32": lion["all-to-all f32"] + 2 * 9}


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_a_device_holds_its_part_of_every_matrix_and_of_its_moments():
    for sizes in MESHES[1:]:
        _, state, frozen = start("finetune", mesh_of(sizes), MODEL, make_config("finetune"))
        for tree in (state.trainable, frozen, state.optimizer):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                if str(path[-1]).endswith(("kernel']", "embed_tokens.embedding']", "position_embedding']")):
                    held = leaf.addressable_shards[0].data.size
                    assert held in (leaf.size // sizes[1], leaf.size // sizes[1] // sizes[2]), path


def test_no_policy_keeps_gathered_weights():
    """Kept, they would be the whole model on every device: each is gathered again for the backward pass."""
    mesh = mesh_of((1, 8, 1))
    _, state, frozen = start("finetune", mesh, MODEL, make_config("finetune"))
    (batch,) = random_batches(MODEL, 1, rows=16)
    gathers = {}
    for remat in REMAT_POLICIES:
        settings = settings_for(MODEL, batch, mesh=mesh, remat=remat)
        jaxpr = jax.make_jaxpr(training_step.loss_and_gradients, static_argnums=0)(
            settings, state.trainable, frozen, batch
        )
        gathers[remat] = str(jaxpr).count(" all_gather[")
    assert len(set(gathers.values())) == 1, gathers


def answers_on(mesh, checkpoint, quantize) -> tuple[list[str], list[float], set[int]]:
    """Texts and log probabilities of a few answers given at the same time, and in how many parts layers lie."""
    options = {"slots": 2, "kept": 0, "context": 256, "adapters": 2, "adapter_rank": 4}
    engine = Engine.from_checkpoint(checkpoint, mesh=mesh, quantize=quantize, **options)
    lora = adapters.lora(3, dora=True)
    weights = AdapterWeights(lora, adapters.adapter(MODEL, lora, projector=True))
    chosen = [engine.base, engine.adapters.load("dora", weights)]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    requests = [Request([("user", "<image>\nWhat colour is it?")], [picture]), Request([("user", "Hello")])]
    prompts = [engine.prepare(request, adapter) for adapter in chosen for request in requests]
    answers = [engine.submit(prompt, Sampling(max_new_tokens=10, logprobs=0)) for prompt in prompts]
    answers.append(engine.submit(prompts[0], Sampling(max_new_tokens=10, logprobs=0, repetition_penalty=1.3)))
    pieces = [piece for answer in answers for piece in answer]
    engine.close()
    params = module_params(jax.tree.unflatten(engine._programs._structure, engine._programs._weights))
    parts = {x.nbytes // x.addressable_shards[0].data.nbytes for name, x in params.items() if LAYER.fullmatch(name)}
    logprobs = [entry.logprob for piece in pieces for entry in piece.token_logprobs]
    return [piece.text for piece in pieces], logprobs, parts


@pytest.mark.parametrize("sizes,quantize", [((1, 4, 2), None), ((2, 1, 4), "int8")])
def test_a_served_model_answers_as_on_one_device(sizes, quantize, tmp_path):
    checkpoint = open_checkpoint(tiny.checkpoint(tmp_path, MODEL))
    texts, logprobs, _ = answers_on(None, checkpoint, quantize)
    texts_on_mesh, logprobs_on_mesh, parts = answers_on(mesh_of(sizes), checkpoint, quantize)
    assert texts_on_mesh == texts
    np.testing.assert_allclose(logprobs_on_mesh, logprobs, rtol=0, atol=1e-4)
    assert parts == {sizes[1] * sizes[2]}  # of every layer's every matrix a device has one
