"""Finds models by directory, or by name on the Hugging Face Hub.

`huggingface_hub` downloads them from `HF_ENDPOINT` to its cache (`HF_HOME`), with the token of `HF_TOKEN` or of `hf
auth login`. A branch or tag is resolved to its commit. Downloads resume after a lost connection or a stopped command,
and files in the cache need no network.
"""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from httpx2 import HTTPError
from huggingface_hub import constants, errors, snapshot_download

from llava_jax.cli import UserError, say
from llava_jax.convert import adapter
from llava_jax.convert.hf_tokenizer import TOKENIZER_FILES

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_SETTINGS = (
    *TOKENIZER_FILES, "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    adapter.SETTINGS, adapter.TRAINED_WITH,
)  # fmt: skip
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors")
# The same weights once more, if the repository has safetensors files.
_TORCH = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model*.bin")
_ONLY_TORCH = ("mm_projector.bin", "non_lora_trainables.bin")


class Located(NamedTuple):
    """A model on a local disk, and its name on the Hub if it was downloaded: `organisation/name@commit`."""

    path: Path
    origin: str | None


def is_name(source: str) -> bool:
    """Whether a text has the form `organisation/name` or `organisation/name@revision`."""
    return _NAME.fullmatch(source) is not None


def locate(source: str, flag: str) -> Located:
    """A path that exists, or the download of a name on the Hub (`organisation/name`, `organisation/name@revision`).

    `flag` is the option that the source was given with. Raises UserError if it is neither, or cannot be downloaded.
    """
    if "://" in os.fspath(source):
        raise UserError(f"{source}: weights are read from a local disk only; copy it there")
    if Path(source).exists():
        return Located(Path(source), None)
    name = _NAME.fullmatch(os.fspath(source))
    if name is None:
        raise UserError(f"{source}: no such file or directory")
    path = _downloaded(name["repository"], name["revision"], flag)
    return Located(path, f"{name['repository']}@{path.name}")


def _downloaded(repository: str, revision: str | None, flag: str) -> Path:
    what = f"{flag} {repository}"
    say(f"{what}: no directory of that name; looking at {constants.ENDPOINT}", file=sys.stderr)
    try:
        path = Path(snapshot_download(repository, revision=revision, allow_patterns=[*_SETTINGS, *_SAFETENSORS]))
        others = _ONLY_TORCH if any(path.glob("*.safetensors")) else _TORCH + _ONLY_TORCH
        # By its commit, so that all files are of the same one.
        snapshot_download(repository, revision=path.name, allow_patterns=list(others))
    except errors.HFValidationError as error:
        raise UserError(f"{what}: no such directory, and no name that the Hub has ({error})") from None
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{repository}"
        raise UserError(f"{what}: its owner grants access: ask at {page}, and set HF_TOKEN to your token") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{what}: no such directory, and {constants.ENDPOINT} has no such model, or a private one: set HF_TOKEN to "
            "your token"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what}: there is no branch, tag or commit {revision} of it") from None
    except (errors.LocalEntryNotFoundError, HTTPError) as error:
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise UserError(
            f"{what}: {constants.ENDPOINT} cannot be reached or broke off ({reason}): the same command again downloads "
            f"the missing files; without a network, copy the model here and give its directory, {flag} DIR"
        ) from None
    return path
