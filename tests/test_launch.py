"""The launch scripts: what they would run, what they refuse, and what runs on the machines that they start.

No cloud, no SLURM and no Docker daemon is at hand: where a script has to react to what such a command answers, a
command of that name that gives the answer stands first in PATH.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml

import llava_jax
from configs import common
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.training import loop

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
CLOUD = ["--project=my-project", "--zone=us-east5-b"]
TRAINING = ["--config=configs/finetune.py:13b,v1.5", "--workdir=gs://bucket/it's a run; $(touch /tmp/x)"]
IMAGE = "us-docker.pkg.dev/my-project/images/llava:1"
DRY_RUNS = {
    "tpu_vm": ["train", "--name=llava", *CLOUD, "--accelerator=v5litepod-16", "--spot", "--", *TRAINING],
    "gke": [
        "run",
        "--name=llava",
        *CLOUD,
        "--cluster=tpus",
        "--accelerator=v6e-16",
        f"--image={IMAGE}",
        "--",
        *TRAINING,
    ],
    "slurm": ["--nodes=2", "--gpus=8", "--time=1-12:00:00", "--partition=h100", "--", *TRAINING],
    "skypilot": ["--name=llava", "--accelerators=H100:8", "--nodes=2", "--spot", "--", *TRAINING],
}


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [LAUNCH / f"{script}.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)


def dry_run(script: str, *arguments: str) -> list[list[str]]:
    """The words of every command that would be run."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    result = run(script, *arguments[:end], "--dry-run", *arguments[end:])
    assert (result.returncode, result.stderr) == (0, "")
    return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]


def option(command: list[str], name: str) -> str:
    (value,) = [word.removeprefix(f"--{name}=") for word in command if word.startswith(f"--{name}=")]
    return value


def command_that(directory: Path, name: str, script: str) -> None:
    """Puts a command into a directory that a test has in its PATH."""
    file = directory / name
    file.write_text(f"#!/usr/bin/env bash\n{script}\n")
    file.chmod(0o755)


def shellcheck(*arguments: str | Path, text: str | None = None) -> None:
    command = [Path(sys.executable).with_name("shellcheck"), f"--source-path={ROOT}", "--external-sources", *arguments]
    checked = subprocess.run(command, input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


# -------------------------------------------------------------------------------------------------- every script


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_has_nothing_to_say(script):
    shellcheck(script)


@pytest.mark.parametrize("script", DRY_RUNS)
def test_help_shows_an_example_that_is_valid(script):
    told = run(script, "--help")
    assert told.returncode == 0
    example = told.stdout.split("\nexample")[1].split("\n\n")[0].split("\n", 1)[1].replace("\\\n", " ")
    for line in example.splitlines():
        words = shlex.split(line)
        assert words.pop(0) == f"launch/{script}.sh"
        assert dry_run(script, *words)


@pytest.mark.parametrize("script", DRY_RUNS)
def test_training_flags_arrive_as_they_were_given(script):
    """Through every shell on the way."""
    commands = dry_run(script, *DRY_RUNS[script])
    if script == "slurm":
        assert commands[0][-2:] == TRAINING
        return
    name = "env=TRAINING" if script == "skypilot" else "command"
    carriers = [
        word.split("=", 2 if script == "skypilot" else 1)[-1]
        for c in commands
        for word in c
        if word.startswith(f"--{name}=")
    ]
    (carrier,) = [text for text in carriers if "--workdir" in text]
    assert shlex.split(carrier)[-2:] == TRAINING


@pytest.mark.parametrize(
    ("script", "changes", "told"),
    [
        ("tpu_vm", {0: "trian"}, "trian, not one of train, create"),
        ("tpu_vm", {"--name": "My_Run"}, "--name is My_Run, which is not like my-run-1"),
        ("tpu_vm", {"--name": None}, "--name must be given"),
        ("tpu_vm", {"--project": "p"}, "--project is p"),
        ("tpu_vm", {"--zone": "us-east5"}, "--zone is us-east5, which is not like us-central2-b"),
        ("tpu_vm", {"--zone": "us-east5-b; rm -rf /"}, "--zone is 'us-east5-b; rm -rf /'"),
        ("tpu_vm", {"--accelerator": "v5e-16"}, "not like v4-8, v5litepod-16"),
        ("tpu_vm", {"--accelerator": "v5litepod-12"}, "v5litepod has 1, 4, 8, 16, 32, 64, 128 or 256 chips"),
        ("tpu_vm", {"--accelerator": "v4-12"}, "v4 has 8, 16, 32, 64 or a multiple of 128 TensorCores"),
        ("tpu_vm", {"--accelerator": "v5p-"}, "v5p has 8, 16"),
        ("tpu_vm", {"--accelerator": "h100-8"}, "not like v4-8"),
        ("tpu_vm", {"--spot": "--reserved --spot"}, "unknown option '--reserved --spot'"),
        ("tpu_vm", {"--runtime": "x y"}, "--runtime is 'x y'"),
        ("tpu_vm", {"--restarts": "many"}, "--restarts is many"),
        ("tpu_vm", {"--nmae": "x"}, "unknown option --nmae=x"),
        ("tpu_vm", {0: "delete"}, "delete takes nothing after --"),
        *((script, {"--workdir": None}, "--workdir=D must be given after --") for script in DRY_RUNS),
        *((script, {"--config": None}, "--config=F must be given after --") for script in DRY_RUNS),
        *((script, {"--config": "configs/finetuen.py"}, "has no file configs/finetuen.py") for script in DRY_RUNS),
        *((script, {"--learning_rate": "1"}, "--learning_rate=1 after --") for script in DRY_RUNS),
        *((s, {"--workdir": "runs/1"}, "the hosts share no disk") for s in ("tpu_vm", "gke", "skypilot")),
        ("gke", {0: ""}, "'', not one of image, cluster, run"),
        ("gke", {"--cluster": None}, "--cluster must be given"),
        ("gke", {"--image": "llava"}, "--image is llava"),
        ("gke", {"--accelerator": "v6e-2"}, "v6e has 1, 4"),
        ("slurm", {"--nodes": "0"}, "--nodes is 0"),
        ("slurm", {"--gpus": "17"}, "--gpus is 17, which is not like 8 (1 to 16)"),
        ("slurm", {"--time": "tomorrow"}, "--time is tomorrow"),
        ("slurm", {"--partition": ""}, "unknown option --partition="),
        ("skypilot", {"--accelerators": "h100"}, "--accelerators is h100"),
        ("skypilot", {"--accelerators": "tpu-v6e-8"}, "a TPU slice is one node"),
        ("skypilot", {"--accelerators": "tpu-v6e-9"}, "v6e has 1, 4"),
        ("skypilot", {"--accelerators": "tpu-v5e-8"}, "which is not like v4-8, v5litepod-16"),
        ("skypilot", {"--infra": "my cloud"}, "--infra is 'my cloud'"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(script, changes, told):
    arguments = list(DRY_RUNS[script])
    for key, value in changes.items():
        if isinstance(key, int):
            arguments[key] = value
            continue
        places = [i for i, word in enumerate(arguments) if word.split("=")[0] == key]
        after = key in ("--config", "--workdir", "--learning_rate")
        place = places[0] if places else (len(arguments) if after else arguments.index("--"))
        arguments[place : place + len(places)] = [] if value is None else [f"{key}={value}"]
        if key == "--spot":
            arguments[place] = value
    refused = run(script, *arguments)  # without --dry-run: nothing may happen before the arguments are known to be good
    assert refused.returncode == 2
    assert re.fullmatch(r"error: [^\n]+\n", refused.stderr) and told in refused.stderr
    assert refused.stdout == ""


@pytest.mark.parametrize("script", DRY_RUNS)
def test_an_earlier_step_can_be_resumed(script):
    """As the error of a damaged checkpoint says."""
    commands = dry_run(script, *DRY_RUNS[script], "--resume-from=300")
    assert "--resume-from=300" in " ".join(word for command in commands for word in command)


def test_slurm_trains_in_the_repository_whatever_the_current_directory(tmp_path):
    """So paths have to be whole; the log is written where the command was given."""
    recipe = tmp_path / "mine.py"
    recipe.touch()
    command = [LAUNCH / "slurm.sh", "--nodes=2", "--gpus=8", "--dry-run", "--", f"--config={recipe}"]

    def submit(*training: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *training], cwd=tmp_path, capture_output=True, text=True)

    accepted = submit("--workdir=/scratch/run", "--config.init=gs://bucket/a", "--config.data.json=/scratch/a.json")
    assert accepted.returncode == 0 and f"--output={tmp_path}/llava-%j.log" in accepted.stdout
    for flag in ("--workdir=runs/a", "--config.init=a", "--config.data.images=images"):
        refused = submit(*(["--workdir=/scratch/run"] if "workdir" not in flag else []), flag)
        assert refused.returncode == 2 and f"error: {flag}: the training runs in {ROOT}" in refused.stderr


# --------------------------------------------------------------------------------------------------------- TPU VM


def test_tpu_vm_asks_sets_up_and_trains_on_all_workers():
    commands = dry_run("tpu_vm", *DRY_RUNS["tpu_vm"])
    described, deleted, created, packed, copied, _, installed, stopped, started, followed, asked = commands
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    assert described[: len(queued) + 2] == [*queued, "describe", "llava"]
    assert deleted[: len(queued) + 2] == [*queued, "delete", "llava"] and "--force" in deleted
    assert created[: len(queued) + 2] == [*queued, "create", "llava"]
    assert option(created, "node-id") == "llava" and option(created, "accelerator-type") == "v5litepod-16"
    assert option(created, "runtime-version") == "v2-alpha-tpuv5-lite" and "--spot" in created
    assert packed[0] == "tar" and "--exclude=./.venv*" in packed
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "llava"]
    for command, worker in ((installed, "all"), (stopped, "all"), (started, "all"), (followed, "0"), (asked, "0")):
        assert command[: len(ssh)] == ssh and option(command, "worker") == worker
        assert set(CLOUD) <= set(command)
    assert copied[: len(ssh) - 2] == ssh[:-2] and "scp" in copied and "--worker=all" in copied
    assert "launch/worker.sh start v5e --config=configs/finetune.py:13b,v1.5" in option(started, "command")


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [("v4-8", "tpu-ubuntu2204-base"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-256", "v2-alpha-tpuv6e")],
)
def test_the_runtime_is_that_of_the_generation(accelerator, runtime):
    commands = dry_run("tpu_vm", "create", "--name=a", *CLOUD, f"--accelerator={accelerator}", "--reserved")
    (created,) = [command for command in commands if "create" in command]
    assert option(created, "runtime-version") == runtime and "--reserved" in created


@pytest.mark.parametrize("command", ["setup", "logs", "status", "stop", "delete"])
def test_each_command_of_tpu_vm_alone(command):
    words = {"setup": "worker.sh setup tpu", "logs": "worker.sh follow", "status": "worker.sh status"}
    words |= {"stop": "worker.sh stop", "delete": "delete llava"}
    commands = dry_run("tpu_vm", command, "--name=llava", *CLOUD)
    assert words[command] in " ".join(commands[-1])


GCLOUD = r"""
echo "$*" >>calls
case "$*" in
  *"queued-resources describe"*)
    [ -f state ] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    cat state ;;
  *"queued-resources create"*) echo ACTIVE >state ;;
  *"queued-resources delete"*) rm state ;;
  *"tpu-vm scp"*) exit "${SCP:-0}" ;;
  *"worker.sh follow"*)
    # The first life of the slice ends while it trains, and so does the connection; the second reaches the end.
    if [ "$(grep -c 'queued-resources create' calls)" -eq 1 ]; then
      echo SUSPENDED >state
      exit 255
    fi ;;
  *"worker.sh status"*) if grep -q ACTIVE state; then echo "$OUTCOME"; else exit 255; fi ;;
esac
"""


def train_on_a_slice_that_is_preempted_once(tmp_path, outcome: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    command_that(tmp_path, "gcloud", f"cd {tmp_path}\n{GCLOUD}")
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = run("tpu_vm", *DRY_RUNS["tpu_vm"], PATH=path, LLAVA_POLL="0", OUTCOME=outcome)
    calls = (tmp_path / "calls").read_text().splitlines()
    kinds = ("queued-resources create", "queued-resources delete", "worker.sh setup", "worker.sh start")
    return result, [kind.split()[1] for call in calls for kind in kinds if kind in call]


def test_a_preempted_slice_is_replaced_and_the_same_command_started_on_it(tmp_path):
    result, calls = train_on_a_slice_that_is_preempted_once(tmp_path, "done")
    assert result.returncode == 0, result.stderr
    assert calls == ["create", "setup", "start", "delete", "create", "setup", "start"]
    assert "llava: SUSPENDED" in result.stderr and "the slice is still there and costs money" in result.stderr
    starts = [line for line in (tmp_path / "calls").read_text().splitlines() if "worker.sh start" in line]
    assert starts[0] == starts[1]


def test_a_training_that_failed_is_not_repeated(tmp_path):
    result, calls = train_on_a_slice_that_is_preempted_once(tmp_path, "failed")
    assert result.returncode == 1 and "error: the training failed" in result.stderr
    assert calls == ["create", "setup", "start", "delete", "create", "setup", "start"]


def test_a_slice_that_cannot_be_set_up_is_not_trained_on_and_given_up_in_the_end(tmp_path):
    command_that(tmp_path, "gcloud", f"cd {tmp_path}\n{GCLOUD}")
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LLAVA_POLL": "0", "OUTCOME": "none", "SCP": "1"}
    name, *options = DRY_RUNS["tpu_vm"]
    result = run("tpu_vm", name, "--restarts=1", *options, **variables)
    assert result.returncode == 1 and "error: interrupted more than 1 times (--restarts)" in result.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.count("tpu-vm scp") == 2 and "tpu-vm ssh" not in calls


def test_a_slice_that_cannot_be_asked_for_is_an_error(tmp_path):
    command_that(tmp_path, "gcloud", "echo 'ERROR: (gcloud) PERMISSION_DENIED' >&2; exit 1")
    result = run("tpu_vm", *DRY_RUNS["tpu_vm"], PATH=f"{tmp_path}:{os.environ['PATH']}", LLAVA_POLL="0")
    assert result.returncode == 1 and "PERMISSION_DENIED" in result.stderr


# ------------------------------------------------------------------------------------------------------- a worker


@pytest.fixture
def worker(tmp_path):
    """`worker.sh`, with this interpreter and a directory of its own."""

    def call(*arguments: str) -> subprocess.CompletedProcess:
        return run("worker", *arguments, LLAVA_PYTHON=sys.executable, LLAVA_RUN=str(tmp_path / "run"))

    return call


def wait_until(condition) -> None:
    while not condition():
        time.sleep(0.1)


def test_a_worker_tells_how_the_training_ended(worker):
    assert worker("status").stdout == "none\n"
    assert worker("follow").returncode == 1
    for arguments, outcome, logged in (
        (["cpu", "--help"], "done", "The same command again resumes"),
        (["cpu", "--config=configs/finetune.py"], "failed", "error: --workdir must be given"),
        (["abacus", "--help"], "failed", "error: 'abacus' is no platform"),
    ):
        assert worker("start", *arguments).returncode == 0
        assert logged in worker("follow").stdout  # which returns when the training ends
        wait_until(lambda: worker("status").stdout != "running\n")
        assert worker("status").stdout == f"{outcome}\n"


def test_a_stopped_worker_has_saved(worker, tmp_path):
    model = tiny.checkpoint(tmp_path)
    data, images = tiny.data(tmp_path)
    workdir = tmp_path / "workdir"
    values = {"init": model, "data.json": data, "data.images": images, "max_length": 64, "batch_rows": 4}
    values |= {"steps": 100_000, "stage": "finetune", "remat": "none"}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    log = tmp_path / "run" / "log.txt"
    assert worker("start", "cpu", "--config=configs/common.py", f"--workdir={workdir}", *flags).returncode == 0
    try:
        assert worker("start", "cpu").returncode == 1  # one at a time
        wait_until(lambda: re.search(r"^step \d", log.read_text(), re.M) or worker("status").stdout != "running\n")
        assert worker("status").stdout == "running\n", log.read_text()
    finally:
        worker("stop")
    assert worker("status").stdout == "interrupted\n"
    assert "stopped by SIGTERM at step" in worker("follow").stdout
    assert open_checkpoint(workdir).step > 0


def test_the_log_has_the_lines_that_the_readme_shows(tmp_path, capsys):
    blocks = re.findall(r"^```text\n(.*?)^```", (LAUNCH / "README.md").read_text(), re.M | re.S)
    at_start, at_resume, at_end = ([re.escape(line).replace("…", ".+") for line in b.splitlines()] for b in blocks)
    config = common.get_config()
    config.update({"init": str(tiny.checkpoint(tmp_path)), "max_length": 64, "batch_rows": 4, "steps": 2})
    config.data.json, config.data.images = map(str, tiny.data(tmp_path))
    for expected in ([*at_start, *at_end], [*at_resume, *at_end]):
        loop.train(config, str(tmp_path / "run"))
        log = capsys.readouterr().err.splitlines()
        assert [line for line in expected if not any(re.fullmatch(line, logged) for logged in log)] == []


# ------------------------------------------------------------------------------------------- the other launchers


def test_gke_builds_makes_trains_and_clears_away():
    common = [*CLOUD, "--cluster=tpus"]
    (built, pushed) = dry_run("gke", "image", *CLOUD, f"--image={IMAGE}")
    assert (
        built[:2] == ["docker", "build"] and option(built, "build-arg") == "EXTRA=tpu" and option(built, "tag") == IMAGE
    )
    assert pushed == ["docker", "push", IMAGE]
    (made,) = dry_run("gke", "cluster", *common, "--accelerator=v5p-8", "--spot")
    assert made[:3] == ["xpk", "cluster", "create"] and option(made, "tpu-type") == "v5p-8" and "--spot" in made
    (started,) = dry_run("gke", *DRY_RUNS["gke"])
    assert started[:3] == ["xpk", "workload", "create"] and option(started, "docker-image") == IMAGE
    assert option(started, "max-restarts") == "20"
    assert option(started, "command").startswith("exec launch/train.sh v6e --config=configs/finetune.py:13b,v1.5 ")
    (entered, logged) = dry_run("gke", "logs", *common, "--name=llava")
    assert (
        entered[:4] == ["gcloud", "container", "clusters", "get-credentials"]
        and option(entered, "region") == "us-east5"
    )
    assert "xpk.google.com/workload=llava" in option(logged, "selector")
    assert dry_run("gke", "stop", *common, "--name=llava")[0][:3] == ["xpk", "workload", "delete"]
    assert dry_run("gke", "delete", *common)[0][:3] == ["xpk", "cluster", "delete"]


def test_slurm_submits_one_process_a_gpu():
    (submitted,) = dry_run("slurm", *DRY_RUNS["slurm"])
    assert submitted[0] == "sbatch" and submitted[-3:] == [str(LAUNCH / "slurm_job.sh"), *TRAINING]
    assert option(submitted, "nodes") == "2" and option(submitted, "time") == "1-12:00:00"
    assert option(submitted, "ntasks-per-node") == option(submitted, "gpus-per-node") == "8"
    assert {"--requeue", "--signal=TERM@300", "--partition=h100"} <= set(submitted)


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [(0, "RUNNING", False), (1, "RUNNING", False), (143, "RUNNING", True), (143, "COMPLETING", False)],
)
def test_a_slurm_job_that_was_stopped_after_saving_queues_again(tmp_path, status, state, requeued):
    command_that(tmp_path, "squeue", f"echo {state}")
    command_that(tmp_path, "srun", f'echo "srun $*"; exit {status}')
    command_that(tmp_path, "scontrol", 'echo "scontrol $*"')
    job = run("slurm_job", *TRAINING, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="17")
    assert job.returncode == status
    assert job.stdout.splitlines()[0] == f"srun --kill-on-bad-exit=1 launch/train.sh gpu {' '.join(TRAINING)}"
    assert job.stdout.splitlines()[1:] == (["scontrol requeue 17"] if requeued else [])


def sky() -> dict:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_launches_the_yaml_with_its_variables():
    (launched,) = dry_run("skypilot", *DRY_RUNS["skypilot"])
    assert launched[:3] == ["sky", "jobs", "launch"] and launched[-1] == str(LAUNCH / "skypilot.yaml")
    assert {"--gpus=H100:8", "--num-nodes=2", "--use-spot", f"--workdir={ROOT}"} <= set(launched)
    given = dict(word.removeprefix("--env=").split("=", 1) for word in launched if word.startswith("--env="))
    assert given.keys() == sky()["envs"].keys() and (given["EXTRA"], given["PLATFORM"]) == ("cuda", "gpu")
    (launched,) = dry_run("skypilot", "--name=llava", "--accelerators=tpu-v5litepod-16", "--", *TRAINING)
    assert {"--env=EXTRA=tpu", "--env=PLATFORM=v5e", "--gpus=tpu-v5litepod-16"} <= set(launched)


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_has_nothing_to_say_of_the_scripts_in_the_yaml(part):
    shellcheck("--shell=bash", "-", text=sky()[part])


@pytest.mark.parametrize(
    ("platform", "nodes", "coordination"),
    [
        ("gpu", "1", []),
        ("gpu", "2", ["--coordinator=10.0.0.1:8476", "--num_processes=2", "--process_id=1"]),
        ("v6e", "4", []),
    ],
)
def test_skypilot_tells_gpu_nodes_where_the_first_is(tmp_path, platform, nodes, coordination):
    (tmp_path / "launch").mkdir()
    command_that(tmp_path / "launch", "train.sh", "printf '%s\\n' \"$@\"")
    (launched,) = dry_run("skypilot", *DRY_RUNS["skypilot"])
    (training,) = [word.removeprefix("--env=TRAINING=") for word in launched if word.startswith("--env=TRAINING=")]
    variables = {"PLATFORM": platform, "TRAINING": training, "SKYPILOT_NUM_NODES": nodes, "SKYPILOT_NODE_RANK": "1"}
    variables["SKYPILOT_NODE_IPS"] = "10.0.0.1\n10.0.0.2"
    told = subprocess.run(
        ["bash", "-c", sky()["run"]], cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True
    )
    assert told.stdout.splitlines() == [platform, *TRAINING, *coordination], told.stderr


# ----------------------------------------------------------------------------------------------------- Dockerfile


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile."""
    text = "\n".join(line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in re.sub(r"\\\n", "", text).splitlines() if line.strip()]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_dockerfile_is_well_formed_and_copies_what_exists():
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM" and set(names) <= {"FROM", "ARG", "RUN", "ENV", "WORKDIR", "COPY", "CMD"}
    for name, arguments in instructions():
        if name == "RUN":
            shellcheck("--shell=sh", "-", text=f"export EXTRA\n{arguments}\n")
        if name == "COPY":
            assert all((ROOT / source).exists() for source in arguments.split()[:-1])


def test_the_dockerfile_installs_from_what_it_has_copied(tmp_path):
    names = [f"{name} {arguments}" for name, arguments in instructions()]
    (install,) = [number for number, line in enumerate(names) if "pip install" in line]
    for name, arguments in instructions()[:install]:
        if name == "COPY":
            *sources, target = arguments.split()
            (tmp_path / target).mkdir(exist_ok=True)
            for source in sources:
                shutil.copy(ROOT / source, tmp_path / target)
    version = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert version.stdout.strip() == llava_jax.__version__


@pytest.mark.parametrize(("extra", "status"), [("tpu", 0), ("cuda", 0), ("", 2), ("gpu", 2)])
def test_the_dockerfile_refuses_other_extras(extra, status):
    (check,) = [arguments for name, arguments in instructions() if name == "RUN" and arguments.startswith("case")]
    refused = subprocess.run(["sh", "-c", check], env={"EXTRA": extra}, capture_output=True, text=True)
    assert refused.returncode == status
    assert bool(status) == refused.stderr.startswith("error: --build-arg EXTRA has to be tpu or cuda")


def test_what_git_ignores_is_not_copied_into_the_image():
    patterns = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    assert ignored and all(any(pattern.removeprefix("**/") == line for pattern in patterns) for line in ignored)
