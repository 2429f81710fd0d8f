"""The npm packages that the demo is made of: images of four vendors, and names and keywords of Unicode's CLDR.

npm's own client fetches them. Their tarballs stay packed: what is needed is read from them.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from base64 import b64encode
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.cli import UserError, say, track


class Package(NamedTuple):
    """A version of a package, by the size and the hash of its tarball."""

    name: str
    version: str
    size: int  # bytes
    integrity: str  # as npm writes it: the SHA-512 in Base64

    @property
    def tarball(self) -> str:
        return f"{self.name}-{self.version}.tgz"


ANNOTATIONS = Package(
    "cldr-annotations-modern",
    "45.0.0",
    4_579_436,
    "sha512-y4YISGdwygWbXiYwWakzd4s0zY+83CceOPEZ+8bzCaPqCgX826Q2TSY3VqLPFE3830KbimgXpSousm2cep0mVw==",
)
IMAGES = {  # by vendor
    "apple": Package(
        "emoji-datasource-apple",
        "16.0.0",
        99_291_668,
        "sha512-dVYjsK0FnCry9F+PBtnivhG2K0xdwlmqYaSgiUtztUdAGPYiHYhZcVKvNBqC791g2qyEcFNTBO6utg4eQ3uLTw==",
    ),
    "google": Package(
        "emoji-datasource-google",
        "16.0.0",
        74_344_091,
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    ),
    "facebook": Package(
        "emoji-datasource-facebook",
        "16.0.0",
        102_958_917,
        "sha512-b9ZxJdB7nMWGckH1vyCjPSosaa6MJYuojPPFiQ0LmDIZS8vlG454XKcmTFKrXIMAA72O4MRJMYFhvWI8pjyciQ==",
    ),
    "twitter": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        61_683_754,
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    ),
}


def fetch(directory: Path) -> None:
    """Downloads the missing tarballs into `directory`.

    Raises:
      UserError: npm is not installed or fails, or a tarball is not the one that is wanted.
    """
    directory.mkdir(parents=True, exist_ok=True)
    packages = (ANNOTATIONS, *IMAGES.values())
    missing = [package for package in packages if not (directory / package.tarball).exists()]
    if missing and not shutil.which("npm"):
        raise UserError(
            f"npm, which fetches the emoji, is not here: install Node.js, or put {missing[0].tarball}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''} into {directory}, made elsewhere by: npm pack "
            + " ".join(f"{package.name}@{package.version}" for package in missing)
        )
    for package in track(missing, "fetching packages of emoji", every=0):
        say(f"{package.name} {package.version}: {package.size / 2**20:.0f} MiB", file=sys.stderr)
        line = ["npm", "pack", "--silent", "--pack-destination", directory, f"{package.name}@{package.version}"]
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            why = " ".join(done.stdout.split())[-300:] or f"status {done.returncode}"
            raise UserError(f"npm cannot fetch {package.name}@{package.version}: {why}")
    for package in packages:
        verify(directory / package.tarball, package)


def verify(file: Path, package: Package) -> None:
    """Raises `UserError` unless `file` is the package's tarball."""
    size = file.stat().st_size
    if size != package.size:
        raise UserError(f"{file}: has {size:,} bytes, not {package.size:,}: delete it, and it is fetched again")
    with file.open("rb") as stream:
        found = "sha512-" + b64encode(hashlib.file_digest(stream, "sha512").digest()).decode()
    if found != package.integrity:
        raise UserError(f"{file}: its hash is {found}, not {package.integrity}: delete it, and it is fetched again")


def read_json(tarball: Path, name: str) -> Any:
    """The content of a JSON file of a package."""
    ((_, content),) = read_files(tarball, [name])
    return json.loads(content)


def read_files(tarball: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of those files of a package, in the tarball's order. Raises `UserError` if one is missing."""
    wanted = {f"package/{name}" for name in names}
    with tarfile.open(tarball, "r|gz") as archive:
        for member in archive:
            if member.name in wanted:
                wanted.discard(member.name)
                yield member.name.removeprefix("package/"), archive.extractfile(member).read()
    if wanted:
        raise UserError(f"{tarball}: has no {min(wanted)}")
