"""Decodes image files and preprocesses them for the vision tower.

`preprocess` is bit-equal to the steps of Hugging Face's CLIP image processor (its Pillow backend) before rescaling.
Rescaling and normalisation happen on the device, so an image is passed on as one byte a channel.

How files are decoded where libraries differ:
  transparency  is laid on white, as transformers 5 does (dropping alpha turns many logos black).
  EXIF rotation is applied, as viewers and transformers' `load_image` do; the original LLaVA ignores the tag.
  16-bit grey   is scaled to 8 bits, as Pillow scales 16-bit colour; Pillow's own conversion clips it to white.
  animations    and files of several pages give their first frame.

Nothing changes global state: any number of threads may decode at once.
"""

import base64
import contextlib
import functools
import io
import itertools
import math
import os
import re
import stat
import struct
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from etils import epath
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin

from llava_jax.cli import UserError
from llava_jax.data.features import Size
from llava_jax.files.reading import refuse_irregular, refuse_pointer
from llava_jax.remote import is_remote

T = TypeVar("T")

ASPECTS = ("square", "pad", "resize")

# The decoders of Pillow that are tried on a file. Others are unsafe: EPS runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# The largest image or intermediate result that is allocated: Pillow refuses larger ones as decompression bombs.
MAX_PIXELS = 2 * 89_478_485
MAX_BYTES = 512 * 2**20  # of a file: no less than `MAX_PIXELS` take in 8 bits a channel

HEAD = 1 << 18  # bytes that hold the header of nearly every file
MAX_SCANS = 100  # of a JPEG: each passes over the complete image
MAX_PLAIN_BYTES, MAX_PLAIN_COMMENTS = 4 << 20, 100  # of a PPM in text, which Pillow parses in Python
MAX_BMP_RUNS = 1 << 20  # bytes of a run-length encoded BMP, which Pillow decodes in Python
MAX_READS = 4096  # of blocks, chunks, segments and tags before the pixels

_FORMS = ("NFC", "NFD")  # Unicode forms in which file systems store names
MAX_SPELLINGS = 1000  # of a name that are tried: each part of it doubles their number
_BAND_ROWS = 1024  # rows padded and resized at a time

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: str | epath.Path) -> Image.Image:
    """Reads an image, local or remote (`gs://`), as upright RGB. Raises `UserError` naming the file."""
    return decode_image(read_image(path), name=str(path))


def read_image(path: str | epath.Path) -> bytes:
    """Reads the bytes of an image file, local or remote (`gs://`).

    Raises `UserError` naming the file unless it is a regular file of at most `MAX_BYTES`.
    """
    try:
        return in_any_spelling(_read, path)
    except (OSError, ValueError) as error:  # ValueError if the name holds a null byte
        raise UserError(f"image {path}: {getattr(error, 'strerror', None) or error}") from error


def read_size(path: str | epath.Path) -> Size:
    """The size of an image file, local or remote, from its first bytes if these have it.

    Raises `UserError` naming the file if it is no image, too large, or not a regular file.
    """
    try:
        return open_image(in_any_spelling(functools.partial(_read, head=HEAD), path), str(path)).size
    except (OSError, ValueError, UserError):  # a header that goes on, or a fault, which is named below
        return open_image(read_image(path), str(path)).size


def _read(path: epath.Path, head: int = 0) -> bytes:
    """The bytes of a regular file, or only the first `head`."""
    if is_remote(path):
        limit = MAX_BYTES
    else:
        found = os.stat(path)
        if not stat.S_ISDIR(found.st_mode):  # which cannot be opened
            refuse_irregular(found, f"image {path}")
        limit = min(found.st_size, MAX_BYTES)
    with path.open("rb") as file:
        data = file.read(head or limit + 1)
    if len(data) > MAX_BYTES:
        raise UserError(f"image {path}: is larger than {MAX_BYTES >> 20} MiB: shrink it or remove it")
    return data


def in_any_spelling(look: Callable[[epath.Path], T], path: str | epath.Path) -> T:
    """Calls `look` with `path` or, if that does not exist, with a path that differs only in Unicode normalisation.

    JSON mostly has composed characters (NFC), archives made on macOS decomposed ones (NFD).
    """
    path = epath.Path(path)
    try:
        return look(path)
    except FileNotFoundError:
        forms = [{part: None} | {unicodedata.normalize(form, part): None for form in _FORMS} for part in path.parts]
        for parts in itertools.islice(itertools.product(*forms), 1, MAX_SPELLINGS):  # the first one is `path` itself
            with contextlib.suppress(FileNotFoundError):
                return look(epath.Path(*parts))
        raise


def decode_image(data: bytes, name: str = "from memory") -> Image.Image:
    """Decodes an image file (JPEG, PNG, WebP, ...) to upright RGB. Its size is checked before it is decoded.

    Raises:
      UserError: the data is no image, truncated, corrupt, too large, or has no agreed meaning in RGB.
    """
    return open_image(data, name).decode()


def load_pixels(image: Image.Image) -> Image.Image:
    """Decodes an image that Pillow has only opened, upright as `load_image` has it; other images stay as they are.

    Raises UserError, also if its file is closed.
    """
    with _errors("from memory"):
        image.load()
        return _upright(image) if isinstance(image, ImageFile.ImageFile) else image


class EncodedImage:
    """An image whose header was read, but not its pixels. See `open_image`."""

    def __init__(self, image: Image.Image, data: bytes, name: str, in_scans: bool):
        self._image, self._data, self._name, self._in_scans = image, data, name, in_scans

    @property
    def size(self) -> Size:
        """Of the image when it is upright."""
        turned = _orientation(self._image) in (5, 6, 7, 8)
        return Size(*(reversed(self._image.size) if turned else self._image.size))

    @property
    def decoded_bytes(self) -> int:
        """An upper estimate of the memory that decoding takes.

        It counts the stored pixels (Pillow has four bytes a pixel but for grey and palettes), the buffers of the
        decoder, and a copy if the image is not upright RGB.
        """
        stored = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}.get(self._image.mode, 4)
        decoder = 2 * len(self._image.getbands()) if self._in_scans else 0
        decoder += 4 if self._image.format == "WEBP" else 0
        copy = 0 if self._image.mode == "RGB" and _orientation(self._image) not in _UPRIGHT else 4
        return self._image.width * self._image.height * (stored + decoder + copy)

    def decode(self) -> Image.Image:
        """Decodes the image to upright RGB. May be called once. Raises UserError."""
        with _errors(self._name):
            image = self._image
            del self._image  # so that nothing refers to what is replaced below
            if isinstance(image.fp, _CountedFile):
                runs = min(len(self._data), MAX_BMP_RUNS) if image.format == "BMP" else 0  # Pillow reads each by itself
                image.fp.reads_left = MAX_READS + image.height + len(self._data) // 128 + runs
            image.load()
            return to_rgb(_upright(image))


def open_image(data: bytes, name: str = "from memory", max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """Reads the header of an encoded image. Raises UserError as `decode_image` does."""
    refuse_pointer(data, f"image {name}")
    with _errors(name):
        file = _CountedFile(data)
        image = _Jpeg(file) if data.startswith(b"\xff\xd8\xff") else Image.open(file, formats=FORMATS)
        refuse_huge(*image.size, max_pixels)
        in_scans = isinstance(image, _Jpeg) and image.in_scans(data)
        if in_scans and data.count(b"\xff\xda") > MAX_SCANS:
            raise UserError(f"has more than {MAX_SCANS} scans: save it again")
        plain = image.format == "PPM" and data[1] in b"123"
        if plain and (len(data) > MAX_PLAIN_BYTES or data.count(b"#") > MAX_PLAIN_COMMENTS):
            raise UserError("is a large PPM in text, or has many comments: save it in binary")
        return EncodedImage(image, data, name, in_scans)


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    """Raises UserError naming the image for whatever Pillow raises."""
    try:
        yield
    except UserError as error:
        raise UserError(f"image {name}: {error}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name} is refused as a decompression bomb: shrink it or remove it") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"image {name} is damaged or none of {', '.join(FORMATS)}: replace it or remove it") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on corrupt data
        raise UserError(f"image {name} is damaged ({error}): replace it or remove it") from error


class _CountedFile(io.BytesIO):
    """A file that limits how often and how much is read of it.

    Metadata of a million small chunks, or a thousand tags that share one large value, would take minutes or gigabytes.
    """

    def __init__(self, data: bytes):
        super().__init__(data)
        self.reads_left, self.bytes_left = MAX_READS, 2 * len(data) + 65536

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.reads_left -= 1
        self.bytes_left -= len(data)
        if self.reads_left < 0 or self.bytes_left < 0:
            raise UserError("has too much metadata, or too small blocks: save it again without")
        return data


class _Jpeg(JpegImagePlugin.JpegImageFile):
    """A JPEG of which Pillow reads neither the resolution nor further images.

    For these it would read all tags of an untrusted block, which may share their values.
    """

    def _read_dpi_from_exif(self) -> None:
        pass

    def in_scans(self, data: bytes) -> bool:
        """Whether libjpeg keeps the coefficients of the complete image while it reads several scans.

        It does if the image is progressive or its first scan lacks a component. Call this before the image is decoded.
        """
        first = data.rfind(b"\xff\xda", 0, self.fp.tell())
        return "progressive" in self.info or data[first + 4] < self.layers


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as RGB; one that is RGB already is returned as it is."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    if image.height <= _BAND_ROWS:
        return _band_to_rgb(image)
    result = Image.new("RGB", image.size)  # in bands, which bounds the memory of intermediate images
    for start in range(0, image.height, _BAND_ROWS):
        band = image.crop((0, start, image.width, min(start + _BAND_ROWS, image.height)))
        result.paste(_band_to_rgb(band), (0, start))
    return result


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: I;16 and its byte orders, or I in older Pillows
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UserError("32-bit pixels have no agreed range: save it with 8 bits a channel")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise UserError("floating-point pixels have no agreed range: save it with 8 bits a channel")
    if image.mode in ("La", "RGBa"):  # colours that were multiplied by their alpha
        image = image.convert(image.mode.upper())
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def thumbnail(image: Image.Image, side: int, quality: int) -> str:
    """A JPEG of at most `side` x `side` pixels, as a data URI for reports."""
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def preprocess(
    image: Image.Image, size: int, aspect: str, mean: Sequence[float], resample: str = "bicubic"
) -> np.ndarray:
    """Preprocesses an image for the vision tower, but for rescaling and normalisation.

    Args:
      image: any Pillow image.
      size: height and width of the result in pixels.
      aspect: `square` resizes the shorter edge to `size` and crops the centre (CLIP's processor); `pad` first
        expands the image to a square of the mean colour (LLaVA 1.5); `resize` stretches it.
      mean: the normalisation's mean per channel in [0, 1]; `pad` uses the colour int(mean * 255).
      resample: the filter, `bicubic` or `bilinear`.

    Returns:
      uint8[size, size, 3], read-only

    Raises:
      UserError: unknown aspect, or an image so thin that resizing it takes more than `MAX_PIXELS`.
    """
    image, kernel = to_rgb(image), Image.Resampling[resample.upper()]
    if aspect == "square":
        image = _resize_and_crop(image, size, kernel)
    elif aspect == "pad":
        image = _pad_and_resize(image, size, tuple(int(channel * 255) for channel in mean), kernel)
    elif aspect == "resize":
        image = resize(image, size, size, kernel)
    else:
        raise UserError(f"unknown image aspect {aspect!r}: choose one of {', '.join(ASPECTS)}")
    return np.asarray(image)


def _resize_and_crop(image: Image.Image, size: int, kernel: Image.Resampling) -> Image.Image:
    """Resizes the shorter edge to `size` (the longer one rounds down) and crops the centre `size` x `size`.

    What the crop drops is computed only where Pillow would round differently without it. Pillow resizes rows before
    columns, so columns can be dropped between the two.
    """
    width, height = image.size
    short, long = sorted(image.size)
    resized = int(size * long / short)
    refuse_huge(*((resized, height) if width > height else (size, resized)))
    part, made = _part_that_resizes_alone(long, resized, size, kernel)
    first = (resized - size) // 2 - made.start
    if width > height:
        image = image.resize((made.stop - made.start, height), kernel, (part.start, 0, part.stop, height))
        return resize(image.crop((first, 0, first + size, height)), size, size, kernel)
    image = image.resize((size, made.stop - made.start), kernel, (0, part.start, width, part.stop))
    return image.crop((0, first, size, first + size))


@functools.lru_cache(maxsize=4096)
def _part_that_resizes_alone(length: int, resized: int, size: int, kernel: Image.Resampling) -> tuple[slice, slice]:
    """The smallest known part of an axis that Pillow resizes bit-equally to the complete axis, and what it makes of it.

    It holds the centre `size` pixels of the resized axis. Pillow takes boxes in float32, so the part has to begin and
    end with a pixel, and has pixel weights of 22 bits: resizing single pixels of that value shows whether they agree.
    """
    step = resized // math.gcd(length, resized)  # each `step` resized pixels are made of an integral number of pixels
    left = (resized - size) // 2
    made = slice(left // step * step, -(-(left + size) // step) * step)
    part = slice(made.start * length // resized, made.stop * length // resized)
    complete = slice(0, length), slice(0, resized)
    if (part, made) == complete or resized >= 100 * size:  # of an image 100 times as tall as wide columns come first
        return complete
    window = 2 * math.ceil(2 * max(length / resized, 1)) + 3  # more pixels than a resized pixel is made of
    ones = Image.fromarray(np.int32(np.arange(length) % window == np.arange(window)[:, None]) << 22)
    together = ones.resize((resized, window), kernel)
    alone = ones.resize((made.stop - made.start, window), kernel, (part.start, 0, part.stop, window))
    return (part, made) if np.array_equal(np.asarray(together)[:, made], np.asarray(alone)) else complete


def _pad_and_resize(
    image: Image.Image, size: int, colour: tuple[int, int, int], kernel: Image.Resampling
) -> Image.Image:
    """Expands to a square, with the image at floor((long - short) / 2), and resizes that to `size` x `size`.

    The square itself, 1.6 GB for a screenshot of 1280 x 20000 pixels, is never allocated. Pillow resizes rows before
    columns, so bands of rows are padded and resized one by one. Rows of a single colour do not change, so the result
    is bit-equal.
    """
    width, height = image.size
    long = max(width, height)
    left, top = (long - width) // 2, (long - height) // 2
    refuse_huge(size, long)
    column = Image.new("RGB", (size, long), colour)
    for start in range(0, height, _BAND_ROWS):
        stop = min(start + _BAND_ROWS, height)
        band = image if stop - start == height else image.crop((0, start, width, stop))
        if left:
            band, rows = Image.new("RGB", (long, stop - start), colour), band
            band.paste(rows, (left, 0))
        column.paste(resize(band, size, stop - start, kernel), (0, top + start))
    return resize(column, size, size, kernel)


def resize(image: Image.Image, width: int, height: int, kernel: Image.Resampling) -> Image.Image:
    """Resizes an image. Raises UserError if that takes more than `MAX_PIXELS`."""
    refuse_huge(width, max(height, image.height))  # Pillow resizes the rows first
    return image.resize((width, height), kernel)


def refuse_huge(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raises UserError for more pixels than are allocated."""
    if width * height > max_pixels:
        raise UserError(f"{width} x {height} pixels are more than {max_pixels}: crop it, shrink it or remove it")


def _upright(image: Image.Image) -> Image.Image:
    """Applies the orientation of EXIF or else XMP; a corrupt block is ignored."""
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int | None:
    """The orientation, as in `Image.getexif`, which would read all other tags, too."""
    tag = ExifTags.Base.Orientation
    found = image.tag_v2.get(tag) if hasattr(image, "tag_v2") else _exif_orientation(_exif(image))
    if found is None and (xmp := image.info.get("XML:com.adobe.xmp") or image.info.get("xmp")):
        xmp = xmp.encode() if isinstance(xmp, str) else xmp
        match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)
        found = int(match[1]) if match else None
    return found


def _exif(image: Image.Image) -> bytes:
    """The EXIF block of an image: a TIFF file."""
    exif = image.info.get("exif", b"")
    if not exif and "Raw profile type exif" in image.info:  # as ImageMagick wrote it into PNG
        with contextlib.suppress(ValueError):
            exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    return exif


def _exif_orientation(exif: bytes) -> int | None:
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    with contextlib.suppress(struct.error):
        if order is not None:
            (start,) = struct.unpack_from(f"{order}L", exif, 4)
            (count,) = struct.unpack_from(f"{order}H", exif, start)
            for entry in range(start + 2, start + 2 + 12 * count, 12):
                tag, kind, _, value = struct.unpack_from(f"{order}HHLH", exif, entry)
                if (tag, kind) == (ExifTags.Base.Orientation, 3):  # 3: of 16 bits
                    return value
    return None
