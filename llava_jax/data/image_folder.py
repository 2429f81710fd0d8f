"""Image folders: which file an image name of untrusted data refers to.

Only the text of a name is checked. Links inside the folder are followed wherever they lead: people link their disks.
"""

import argparse
import os
import posixpath
import re
import unicodedata
from dataclasses import dataclass

from etils import epath

from llava_jax.cli import UserError, shown

MAX_LENGTH = 4096  # characters; Linux and macOS allow fewer
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")  # Unicode forms to which file systems may convert a name
_READABLE = re.compile(r"/|[a-zA-Z][\w.+-]+://")  # absolute names that can be allowed: paths of Unix, of object stores
_ABSOLUTE = re.compile(rf"{_READABLE.pattern}|[a-zA-Z]:/")  # with drives of Windows


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images, local or remote. It is used like a path, and false if there is none.

    Attributes:
      folder: the folder that names are relative to.
      allow_absolute: whether absolute names are read, too, wherever they lead.
    """

    folder: epath.PathLike
    allow_absolute: bool = False

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def __bool__(self) -> bool:
        return bool(str(self))


def image_path(images: epath.PathLike, name: str) -> epath.Path:
    """The file of an image in folder `images`. Raises `UserError` if the name leaves the folder."""
    allow_absolute = isinstance(images, ImageFolder) and images.allow_absolute
    if fault := name_fault(name, allow_absolute):
        raise UserError(f"image {shown(name)} {fault}")
    if ".." in name:  # `a/../b` is `b` even if `a` is a link
        name = posixpath.normpath(name)
    return epath.Path(name) if _READABLE.match(name) else epath.Path(images) / name


def name_fault(name: str, allow_absolute: bool = False) -> str | None:
    """Why a name is refused; None if it stays below its folder in each Unicode form, or may be absolute."""
    if len(name) > MAX_LENGTH:
        return f"has {len(name):,} characters: no file has a name of more than {MAX_LENGTH:,}"
    if "\0" in name:
        return "holds a NUL character"
    for form in _FORMS:
        path = unicodedata.normalize(form, name).replace("\\", "/")
        if _ABSOLUTE.match(path):
            if not (allow_absolute and _READABLE.match(name)):
                return (
                    "is an absolute name: those relative to the folder of images are read; --allow-absolute-images "
                    "(data.allow_absolute_images of a run) reads absolute ones, too"
                )
        elif (first := posixpath.normpath(path).split("/")[0]) in ("..", "."):
            return "leaves the folder of images" if first == ".." else "names no file"
    return None


def add_allow_absolute(parser: argparse.ArgumentParser) -> None:
    """Adds the option of all commands that read images by names in files."""
    what = "read images with absolute names, too, wherever they are"
    parser.add_argument("--allow-absolute-images", action="store_true", help=what)


def folder_of(args: argparse.Namespace) -> ImageFolder:
    """The folder of a command with this option and `--images`; false if that is not given."""
    return ImageFolder(args.images or "", args.allow_absolute_images)
