"""Hugging Face weights to a checkpoint: a CLIP and a LLaMA, or a LLaVA.

What a directory holds is decided by its `config.json` and its tensors alone. Tensors keep their types and bits;
every key has to be accounted for.
"""

import dataclasses
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from llava_jax.checkpoint import Description, refuse_existing, save_model
from llava_jax.cli import UserError, track
from llava_jax.convert import hf_config, hf_tokenizer, layouts
from llava_jax.convert.hf_processor import ImageSettings, read_image_settings
from llava_jax.convert.layouts import Source
from llava_jax.convert.names import to_ours
from llava_jax.convert.tensors import Tensors, open_directory, read_json
from llava_jax.data.conversation import get_template
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import Params, module_params
from llava_jax.models.projector import Projector, num_projector_layers

FRESH_PROJECTOR = "mlp2x_gelu"
KEPT_FILES = ("generation_config", "preprocessor_config", "processor_config")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asks for; None where the source or the default decides."""

    template: str = "v1"
    projector_type: str | None = None
    aspect: str | None = None
    select_layer: int | None = None
    select_feature: str | None = None
    seed: int = 0  # of a fresh projector


@dataclasses.dataclass(frozen=True)
class Model:
    """A model found on disk, its weights not yet read."""

    config: LlavaConfig
    sources: dict[str, Source]  # part -> where it is; no projector means a fresh one
    hf: dict[str, Any]  # JSON files to keep for an export
    tokenizer_dir: Path


def import_backbones(llm: str, vision: str, projector: str | None, output: str, options: Options) -> None:
    """Joins a LLaMA and a CLIP by a projector, from a safetensors file or fresh."""
    _import(lambda: _find_backbones(_local(llm), _local(vision), projector and _local(projector), options), output, options)


def import_llava(directory: str, output: str, options: Options) -> None:
    """Imports a LLaVA of transformers, in whichever of its layouts."""
    _import(lambda: _find_llava(_local(directory), options), output, options)
