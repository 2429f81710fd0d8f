"""The recipes are the published ones, and a mistyped override is one clear line."""

import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import finetune, finetune_lora, llava_next, pretrain, scienceqa
from llava_jax import main, recipes
from llava_jax.cli import UserError
from llava_jax.data.templates import TEMPLATES
from llava_jax.models.config import PRESETS
from llava_jax.training import config_check

SHARED = {"warmup_ratio": 0.03, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, "max_length": 2048}
# stage, argument -> learning rate, rows, epochs, clipping, template, aspect, image position
PUBLISHED = {
    (pretrain, "7b,v0"): (2e-3, 128, 1, 1.0, "llava_v0", "square", "random"),
    (finetune, "13b,v0"): (2e-5, 32, 3, 1.0, "llava_v0", "square", "random"),
    (scienceqa, ""): (2e-5, 32, 12, 1.0, "llava_v0", "square", "as_is"),
    (pretrain, ""): (1e-3, 256, 1, 0.0, "plain", "square", "first"),
    (finetune, ""): (2e-5, 128, 1, 0.0, "v1", "pad", "first"),
    (llava_next, "13b"): (1e-5, 128, 1, 1.0, "v1", "anyres", "first"),
    (finetune_lora, ""): (2e-4, 128, 1, 0.0, "v1", "pad", "first"),
}


@pytest.mark.parametrize("recipe", PUBLISHED, ids=str)
def test_hyperparameters_are_the_published_ones(recipe):
    module, argument = recipe
    config = module.get_config(argument)
    keys = ("learning_rate", "batch_rows", "epochs", "clip_norm", "template", "image_aspect", "image_position")
    assert tuple(config[key] for key in keys) == PUBLISHED[recipe]
    shared = SHARED | ({"max_length": 4096} if module is llava_next else {})
    assert {key: config[key] for key in shared} == shared
    assert (
        config.default_model in PRESETS
        and config.model in ("", config.default_model)
        and config.template in TEMPLATES
        and config.is_locked
    )
    assert 0 < config.max_rows_per_device <= 4


def test_a_bare_recipe_is_7b_v1_5_for_a_checkpoint_of_any_size():
    bare, full = finetune.get_config(""), finetune.get_config("v1.5,7b")
    assert (bare.model, full.model) == ("", "llava-v1.5-7b")
    assert bare.to_dict() | {"model": full.model} == full.to_dict()
    assert pretrain.get_config("v0").default_model == "llava-v0-7b" and not pretrain.get_config("v0").model
    assert finetune.get_config("13b").model == finetune.get_config("13b").default_model == "llava-v1.5-13b"
    with pytest.raises(ValueError, match="'14b' in '14b,v0' is none of 7b, 13b, v1.5, v0"):
        finetune.get_config("14b,v0")
    assert (scienceqa.get_config().model, scienceqa.get_config().default_model) == ("", "llava-v0-13b")
    assert scienceqa.get_config("7b").model == scienceqa.get_config("7b").default_model == "llava-v0-7b"
    with pytest.raises(ValueError, match="'v1.5' is none of 7b, 13b"):
        scienceqa.get_config("v1.5")


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_recipe_with_lora_is_finetune_with_the_published_adapters(size):
    config = finetune_lora.get_config(size)
    lora = config.lora.to_dict()
    assert (lora["rank"], lora["alpha"], lora["dropout"], lora["rslora"], lora["dora"]) == (
        128,
        256.0,
        0.05,
        False,
        False,
    )
    published = {"learning_rate": 2e-4, "projector_learning_rate": 2e-5, "lora": lora}
    assert config.to_dict() == finetune.get_config(size).to_dict() | published
    with pytest.raises(ValueError, match="'v0' in '7b,v0': LoRA has a published recipe for v1.5 only"):
        finetune_lora.get_config("7b,v0")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ["--config=configs/finetune.py", "--config.learing_rate=1"],
            "no key 'learing_rate'; the nearest is 'learning_",
        ),
        (["--config=configs/finetune.py", "--config.data.jsn=a"], "no key 'data.jsn'; the nearest is 'data.json'"),
        (["--config=configs/finetune.py", "--config.steps=many"], "config.steps=many"),
        (["--config=configs/finetune.py:14b"], "'14b' in '14b' is none of"),
        (["--config=configs/no_such_file.py", "--workdir=w"], "no_such_file.py"),
        (
            ["--config=finetuen:7b", "--workdir=w"],
            "no recipe 'finetuen'; the package has pretrain, finetune, finetune_lora, llava_next, scienceqa",
        ),
        (["--config=configs/finetune", "--workdir=w"], "the path of a recipe of your own ends with .py"),
        (["--config=finetune:14b"], "'14b' in '14b' is none of"),
        (["--config", "finetune", "--config.learing_rate=1"], "no key 'learing_rate'; the nearest is 'learning_rate'"),
        (["--config=configs/finetune.py", "--wrkdir=w"], "Did you mean: workdir"),
        (["--config=configs/finetune.py"], "--workdir must be given"),
        (["--config=configs/finetune.py", "--workdir=w", "more"], "unexpected argument 'more'"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, monkeypatch):
    assert message in mistake(arguments, monkeypatch)


@pytest.mark.parametrize(
    "text,message",
    [
        ("def get_config(:", "SyntaxError: invalid syntax ({file}, line 1)"),
        ("import json\nimport no_such_module", "No module named 'no_such_module' ({file}, line 2)"),
        ("from configs.recipes import nothing", "({file}, line 1)"),
        ("def get_config():\n    return 1 / 0", "ZeroDivisionError: division by zero ({file}, line 2)"),
        ("def get_config():\n    assert False", "AssertionError ({file}, line 2)"),
        ("import json\ndef get_config():\n    return json.loads('{{')", "({file}, line 3)"),
        ("def get_config():\n    return open('/nowhere')", "'/nowhere' ({file}, line 2)"),
        ("def get_config():\n    return int('x')", "invalid literal for int() with base 10: 'x' ({file}, line 2)"),
        ("def get_config(a, b):\n    pass", "{file}: get_config() missing 2 required positional arguments"),
        ("size = 7", "{file}: is no recipe: it has no function get_config"),
        ("def get_config():\n    pass", "{file}: get_config() returns no ConfigDict"),
        (
            "from configs import common\ndef get_config():\n    c = common.get_config()\n    c.learing_rate = 1\n",
            "the config has no key 'learing_rate'; the nearest is 'learning_rate' ({file}, line 4)",
        ),
        (
            "from configs import common\ndef get_config():\n    c = common.get_config()\n    c.zzz = 1\n",
            "the config has no key 'zzz' ({file}, line 4)",
        ),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_line_with_its_place(text, message, tmp_path, monkeypatch):
    file = tmp_path / "recipe.py"
    file.write_text(text.replace("{{", "{"))
    for more in ([], ["--config.steps=3"]):
        told = mistake([f"--config={file}", "--workdir=w", *more], monkeypatch)
        assert message.format(file=file) in told and len(told) < 200


def test_a_recipe_that_does_not_begin_with_all_keys_is_one_line():
    with pytest.raises(UserError, match="the config has no key 'stage': a recipe begins with common.get_config"):
        config_check.check(ConfigDict({"steps": 1}))


def parse(arguments, monkeypatch) -> ConfigDict:
    """The config of a command line."""
    monkeypatch.setattr("sys.argv", ["main", *arguments])
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    main.flags.FLAGS.unparse_flags()
    main.parse_flags(["main", *arguments], (main.CONFIG,))
    return main.CONFIG.value


@pytest.mark.parametrize("name", recipes.NAMES)
def test_a_recipe_of_the_package_is_found_by_its_name(name, monkeypatch):
    by_path = parse([f"--config=configs/{name}.py"], monkeypatch)
    for arguments in ([f"--config={name}"], ["--config", name], [f"-config={name}"]):
        assert parse(arguments, monkeypatch).to_dict() == by_path.to_dict()
    if name != "common":
        assert parse([f"--config={name}:7b"], monkeypatch).default_model.endswith("-7b")


def test_recipes_need_no_clone_and_do_not_import_jax(tmp_path, monkeypatch):
    """Elsewhere, with a recipe of one's own. JAX reads its environment when it is imported, so preflight has to set
    that after it has read the recipe."""
    monkeypatch.setenv("PYTHONPATH", str(Path(main.__file__).parents[1]))
    (tmp_path / "mine.py").write_text("from llava_jax.recipes.finetune import get_config as get_config\n")
    program = (
        "import sys; from llava_jax import main\n"
        "main.parse_flags(sys.argv, (main.CONFIG,)); config = main.CONFIG.value\n"
        "assert (config.stage, config.default_model, config.steps) == ('finetune', 'llava-v1.5-13b', 7)\n"
        "assert 'jax' not in sys.modules and 'configs' not in sys.modules\n"
    )
    for recipe in ("finetune:13b", "mine.py:13b"):
        command = [sys.executable, "-c", program, f"--config={recipe}", "--config.steps=7"]
        done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr.decode()


def mistake(arguments, monkeypatch) -> str:
    """The one line of a command line that is refused."""
    monkeypatch.setattr("sys.argv", ["main", *arguments])  # where config_flags looks for overrides
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # what config_flags calls any recipe
    main.flags.FLAGS.unparse_flags()
    for flag in ("config", "workdir"):
        main.flags.FLAGS[flag].value = None
    with pytest.raises(UserError) as error:
        main.parse_flags(["main", *arguments], (main.CONFIG, main.WORKDIR))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_home_directory_is_meant_in_every_path_of_a_run(monkeypatch, tmp_path):
    """By flags, which shells leave alone, and in config files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(
        "from configs.finetune import get_config as recipe\n"
        "from ml_collections import ConfigDict\n"
        "def get_config(arg):\n"
        "    config = recipe(arg)\n"
        "    config.init = '~/stage 1'\n"
        "    with config.unlocked():\n"
        "        built = ConfigDict({'built': '~/b', 'weight': 0.5})\n"
        "        config.data.mixture = ({'json': '~/a.json', 'images': '~'}, built)\n"
        "    return config.lock()\n"
    )
    arguments = ["main", "--config=~/mine.py:13b", "-workdir=~/run", "--config.evaluate.labels=~/labels"]
    monkeypatch.setattr("sys.argv", arguments)
    main.flags.FLAGS.unparse_flags()
    main.parse_flags(arguments, (main.CONFIG, main.WORKDIR))
    config = main.CONFIG.value
    assert (main.WORKDIR.value, config.init) == (f"{tmp_path}/run", f"{tmp_path}/stage 1")
    assert config.evaluate.labels == f"{tmp_path}/labels"
    assert config.data.mixture == (
        {"json": f"{tmp_path}/a.json", "images": str(tmp_path)},
        {"built": f"{tmp_path}/b", "weight": 0.5},
    )
    assert config.is_locked
