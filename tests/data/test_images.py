import io
import os
import struct
import tracemalloc
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_jax.cli import UserError
from llava_jax.data import images
from llava_jax.data.images import decode_image, load_image, load_pixels, open_image, preprocess, to_rgb

MEAN = (0.48145466, 0.4578275, 0.40821073)
PHOTOGRAPHS = os.path.join(os.path.dirname(skimage.__file__), "data")
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png")

SIZES = st.integers(1, 90)


def noise(width, height, bands=3, seed=0):
    shape = (height, width, bands) if bands > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def hf_processor(size, aspect, resample):
    kind = LlavaImageProcessorPil if aspect == "pad" else CLIPImageProcessorPil
    shape = {"height": size, "width": size} if aspect == "resize" else {"shortest_edge": size}
    return kind(
        size=shape,
        crop_size={"height": size, "width": size},
        do_center_crop=aspect != "resize",
        do_pad=aspect == "pad",
        do_rescale=False,
        do_normalize=False,
        resample=Image.Resampling[resample.upper()],
    )


def hf(image, size, aspect, resample="bicubic"):
    pixels = np.asarray(hf_processor(size, aspect, resample)(image)["pixel_values"][0])
    return pixels.transpose(1, 2, 0)


def expand_to_square(image, colour):
    """As the original LLaVA pads, written down plainly."""
    long = max(image.size)
    square = Image.new("RGB", (long, long), colour)
    square.paste(image, ((long - image.width) // 2, (long - image.height) // 2))
    return square


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("aspect", images.ASPECTS)
@pytest.mark.parametrize("size", [224, 336, 97])
def test_photographs_equal_hf(aspect, size):
    for name in NAMES:
        image = load_image(os.path.join(PHOTOGRAPHS, name))
        pixels = preprocess(image, size, aspect, MEAN)
        assert pixels.dtype == np.uint8 and pixels.shape == (size, size, 3)
        np.testing.assert_array_equal(pixels, hf(image, size, aspect), err_msg=name)


@settings(max_examples=60, deadline=None)
@given(
    width=SIZES,
    height=SIZES,
    size=st.integers(1, 70),
    aspect=st.sampled_from(images.ASPECTS),
    resample=st.sampled_from(["bicubic", "bilinear"]),
)
def test_any_size_equals_hf(width, height, size, aspect, resample):
    image = noise(width, height)
    pixels = preprocess(image, size, aspect, MEAN, resample)
    np.testing.assert_array_equal(pixels, hf(image, size, aspect, resample))


@pytest.mark.parametrize("size", [256, 384, 512])
def test_photographs_equal_siglip2s_processor(size):
    """Which stretches images to a square, bilinearly."""
    processor = SiglipImageProcessorPil(size={"height": size, "width": size}, resample=2, do_rescale=False)
    for name in NAMES:
        image = load_image(os.path.join(PHOTOGRAPHS, name))
        theirs = np.asarray(processor(image, do_normalize=False)["pixel_values"][0]).transpose(1, 2, 0)
        np.testing.assert_array_equal(preprocess(image, size, "resize", MEAN, "bilinear"), theirs, err_msg=name)


@pytest.mark.parametrize("shape", [(1500, 2501), (640, 427), (3000, 70), (1, 300)])
@pytest.mark.parametrize("aspect", images.ASPECTS)
def test_bilinear_images_equal_hf(aspect, shape):
    image = noise(*shape)
    np.testing.assert_array_equal(preprocess(image, 64, aspect, MEAN, "bilinear"), hf(image, 64, aspect, "bilinear"))


def resize_then_crop(image, size):
    """As CLIP's processor makes a square, written down plainly."""
    short = min(image.size)
    width, height = (int(size * edge / short) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


@settings(max_examples=100, deadline=None)
@given(ratio=st.tuples(st.integers(1, 16), st.integers(1, 16)), scale=st.integers(1, 50), size=st.integers(1, 128))
def test_what_the_crop_throws_away_leaves_no_trace(ratio, scale, size):
    image = noise(ratio[0] * scale, ratio[1] * scale)
    np.testing.assert_array_equal(preprocess(image, size, "square", MEAN), resize_then_crop(image, size))


@pytest.mark.parametrize("shape", [(640, 480), (480, 640), (640, 427), (500, 333), (2, 199), (3, 303), (4, 404)])
def test_typical_and_thin_shapes_are_resized_then_cropped(shape):
    image = noise(*shape)
    np.testing.assert_array_equal(preprocess(image, 56, "square", MEAN), resize_then_crop(image, 56))


def test_the_crop_is_resized_alone_where_pixels_meet(monkeypatch):
    part = images._part_that_resizes_alone.__wrapped__
    kernel = Image.Resampling.BICUBIC
    assert part(640, 448, 336, kernel) == (slice(80, 560), slice(56, 392))
    assert part(640, 503, 336, kernel) == (slice(0, 640), slice(0, 503))  # 640 and 503 share no divisor
    monkeypatch.setattr(np, "array_equal", lambda a, b: False)  # a Pillow whose weights differ
    assert part(640, 448, 336, kernel) == (slice(0, 640), slice(0, 448))


@settings(max_examples=30, deadline=None)
@given(width=SIZES, height=SIZES)
def test_pad_is_expand_to_square(width, height):
    image = noise(width, height)
    square = expand_to_square(image, (122, 116, 104))
    expected = np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(preprocess(image, 32, "pad", MEAN), expected)
    long = max(width, height)  # and without a resize, so that the offset itself is seen
    np.testing.assert_array_equal(preprocess(image, long, "pad", MEAN), np.asarray(square))


@pytest.mark.parametrize("shape", [(1500, 2501), (70, 3000), (3000, 70)])
def test_bands_of_padding_meet_seamlessly(shape):
    image = noise(*shape)
    np.testing.assert_array_equal(preprocess(image, 64, "pad", MEAN), hf(image, 64, "pad"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_equal_hf(mode):
    image = noise(40, 30, bands=4).convert("RGB").convert(mode) if mode != "RGBA" else noise(40, 30, bands=4)
    np.testing.assert_array_equal(preprocess(image, 16, "square", MEAN), hf(image, 16, "square"))


@pytest.mark.parametrize(
    "image, transparent",
    [(noise(8, 8, bands=4), None), (noise(8, 8).convert("P"), 3), (noise(8, 8), (1, 2, 3)), (noise(8, 8, 1), 9)],
    ids=["RGBA", "P", "RGB", "L"],
)
def test_transparency_is_laid_on_white(image, transparent):
    data = encoded(image, **({} if transparent is None else {"transparency": transparent}))
    ours = np.asarray(decode_image(data)).astype(int)
    rgba = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(int)
    opacity = rgba[..., 3:] / 255
    np.testing.assert_allclose(ours, rgba[..., :3] * opacity + 255 * (1 - opacity), atol=1)
    np.testing.assert_array_equal(preprocess(decode_image(data), 8, "square", MEAN), ours)


def test_cmyk_jpeg():
    data = encoded(noise(16, 16).convert("CMYK"), "JPEG")
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(expected))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format):
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    pixels = np.asarray(decode_image(encoded(Image.fromarray(ramp), format)))
    assert pixels.min() == 0 and pixels.max() == 255
    np.testing.assert_array_equal(pixels, np.repeat((ramp >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(noise(12, 8), format, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    result = decode_image(data)
    assert result.size == ((12, 8) if orientation < 5 else (8, 12))
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


def test_an_image_that_pillow_opened_is_turned_as_its_file_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(noise(12, 8), "PNG", exif=exif))
    expected = np.asarray(load_image(path))
    upright = load_pixels(Image.open(path))
    np.testing.assert_array_equal(np.asarray(upright), expected)
    np.testing.assert_array_equal(np.asarray(load_pixels(upright)), expected)
    np.testing.assert_array_equal(np.asarray(load_pixels(load_image(path))), expected)


def test_corrupt_exif_is_ignored():
    data = encoded(noise(12, 8), exif=b"Exif\0\0garbage")
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(noise(12, 8)))


def test_webp_and_animation():
    frames = [noise(10, 10, seed=0), noise(10, 10, seed=1)]
    data = encoded(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(frames[0]))


def test_mpo_as_phones_write_it():
    data = encoded(noise(16, 16), "MPO", save_all=True, append_images=[noise(16, 16, seed=1)])
    expected = Image.open(io.BytesIO(encoded(noise(16, 16), "JPEG")))
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(expected))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 501)])
@pytest.mark.parametrize("aspect", images.ASPECTS)
def test_thin_pictures_equal_hf(shape, aspect):
    image = noise(*shape)
    np.testing.assert_array_equal(preprocess(image, 56, aspect, MEAN), hf(image, 56, aspect))


@pytest.mark.parametrize("shape", [(1, 600_000), (600_000, 1)])
def test_needless_gigabytes_are_refused(shape):
    with pytest.raises(UserError, match="pixels"):
        preprocess(Image.new("RGB", shape), 336, "square", MEAN)


def test_padding_a_long_screenshot_does_not_make_the_square(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 30 * 2000)  # the square would have 2000 x 2000
    image = noise(20, 2000)
    np.testing.assert_array_equal(preprocess(image, 16, "pad", MEAN), hf(image, 16, "pad"))


@pytest.fixture(scope="module")
def bomb():
    return encoded(Image.new("1", (20_000, 20_000)), compress_level=1)


def test_decompression_bomb_is_refused(tmp_path, bomb):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb)
    with pytest.raises(UserError, match="bomb.png is refused.*bomb"):
        load_image(path)


def saved(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tags_that_share_a_value(size: int, count: int) -> bytes:
    """A TIFF file of so many tags, the value of each of which is the whole rest of it."""
    tags = b"".join(struct.pack("<HHLL", 1000 + i, 7, size, 8) for i in range(count))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + tags + bytes(size)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


GIF, JPEG, PNG = (saved(NOISE, format) for format in ("GIF", "JPEG", "PNG"))
GIF_HEAD = 13 + 3 * (2 << (GIF[10] & 7))
METADATA = {
    "GIF comment": GIF[:GIF_HEAD] + b"\x21\xfe" + (b"\xff" + b"a" * 255) * 20_000 + b"\0" + GIF[GIF_HEAD:],
    "JPEG segments": JPEG[:2] + b"\xff\xe1\0\x02" * 1_000_000 + JPEG[2:],
    "PNG chunks": PNG[:33] + chunk(b"prIv", b"") * 500_000 + PNG[33:],
    "PNG chunks after the pixels": PNG[:-12] + chunk(b"prIv", b"") * 500_000 + PNG[-12:],
    "PNG texts": PNG[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(900_000), 9)) * 200 + PNG[33:],
    "TIFF tags": tags_that_share_a_value(1_000_000, 3000),
    "PPM comment": b"P6 #" + b"a" * 1_000_000 + b"\n1 1 255\n" + bytes(3),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_is_bounded(kind):
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="metadata|damaged"):
            decode_image(METADATA[kind])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize("marker", [b"\xff\xe1", b"\xff\xe2"])
def test_tags_of_a_jpeg_that_share_their_values_take_nothing(marker):
    block = {b"\xff\xe1": b"Exif\0\0", b"\xff\xe2": b"MPF\0"}[marker] + tags_that_share_a_value(10_000, 4000)
    data = JPEG[:2] + marker + struct.pack(">H", len(block) + 2) + block + JPEG[2:]
    tracemalloc.start()
    try:
        assert decode_image(data).size == NOISE.size
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def one_component_a_scan() -> bytes:
    """A JPEG that is not progressive, whose scans have a component each."""
    data = saved(Image.new("RGB", NOISE.size), "JPEG", subsampling=0)
    scans = [b"\xff\xda\0\x08\x01" + bytes([i, 0 if i == 1 else 0x11, 0, 63, 0]) + bytes(1000) for i in (1, 2, 3)]
    return data[: data.index(b"\xff\xda")] + b"".join(scans) + b"\xff\xd9"


@pytest.mark.parametrize("data", [saved(NOISE, "JPEG", progressive=True), one_component_a_scan()])
def test_scans_of_a_jpeg_are_bounded(data):
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff", start + 2)]
    assert decode_image(data).size == NOISE.size
    with pytest.raises(UserError, match="scans"):
        decode_image(data[:start] + scan * 200 + data[start:])


def test_images_in_text_are_bounded():
    assert decode_image(b"P3 # by hand\n2 1 255\n1 2 3 4 5 6\n").getpixel((1, 0)) == (4, 5, 6)
    for data in (b"P3 900 900 255\n" + b"1 " * (3 << 20), b"P2 8 8 255\n" + b"#\n" * 400_000):
        with pytest.raises(UserError, match="save it in binary"):
            decode_image(data)


def test_a_jpeg_in_one_scan_may_be_followed_by_anything():
    """As phones add a film to it."""
    assert decode_image(saved(NOISE, "JPEG") + b"\xff\xda" * 200).size == NOISE.size


@pytest.mark.parametrize("kind", ["exif", "xmp", "png"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientations_are_those_that_pillow_reads(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    xmp = f'<x tiff:Orientation="{orientation}"/>'.encode()
    options = {"xmp": xmp} if kind == "xmp" else {"exif": exif}
    data = saved(NOISE, "PNG" if kind == "png" else "JPEG", **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_tall_images_are_converted_as_short_ones(mode):
    grey = np.random.default_rng(0).integers(0, 2**16, (2500, 3), np.uint16)
    image = Image.fromarray(grey) if mode == "I;16" else NOISE.resize((3, 2500)).convert(mode)
    parts = [to_rgb(image.crop((0, top, 3, min(top + 500, 2500)))) for top in range(0, 2500, 500)]
    assert np.array_equal(np.asarray(to_rgb(image)), np.concatenate([np.asarray(part) for part in parts]))


@pytest.mark.parametrize(
    "data, bytes_a_pixel",
    [
        (JPEG, 4),
        (saved(NOISE, "JPEG", exif=rotated()), 8),
        (saved(NOISE, "JPEG", progressive=True), 10),
        (one_component_a_scan(), 10),
        (saved(NOISE.convert("CMYK"), "JPEG"), 8),
        (saved(NOISE.convert("L"), "PNG"), 5),
        (saved(Image.fromarray(np.zeros((20, 30), np.uint16)), "PNG"), 6),
        (saved(NOISE, "WEBP"), 8),
    ],
)
def test_what_decoding_takes_is_known_before(data, bytes_a_pixel):
    assert open_image(data).decoded_bytes == 20 * 30 * bytes_a_pixel


def test_own_limit_holds_where_a_library_has_lifted_pillows(monkeypatch, bomb):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(UserError, match="20000 x 20000"):
        decode_image(bomb)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused(tmp_path, format):
    path = tmp_path / f"short.{format.lower()}"
    data = encoded(noise(50, 50), format)
    for length in (0, 3, 20, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="short"):
            load_image(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), format=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
def test_corrupt_bytes_decode_or_raise_a_user_error(data, format):
    corrupt = bytearray(encoded(noise(20, 20), format))
    for _ in range(data.draw(st.integers(1, 5))):
        corrupt[data.draw(st.integers(0, len(corrupt) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(corrupt), "x")
    except UserError as error:
        assert "image x" in str(error)
    else:
        assert image.mode == "RGB"


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "page.png").write_text("<html>404</html>")
    (tmp_path / "drawing.eps").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    for name in ("page.png", "drawing.eps"):
        with pytest.raises(UserError, match=f"{name} is damaged or none of JPEG"):
            load_image(tmp_path / name)
    with pytest.raises(UserError, match="missing.png: No such file"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(UserError, match="directory"):
        load_image(tmp_path)
    with pytest.raises(UserError, match="null byte"):
        load_image("a\0b.png")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(dtype):
    values = np.full((4, 4), 70_000, dtype)
    with pytest.raises(UserError, match="image x: .*8 bits"):
        decode_image(encoded(Image.fromarray(values), "TIFF"), "x")


def test_unknown_aspect_is_refused():
    with pytest.raises(UserError, match="square, pad, resize"):
        preprocess(noise(4, 4), 4, "stretch", MEAN)


def test_threads_agree():
    path = os.path.join(PHOTOGRAPHS, "chelsea.png")
    expected = preprocess(load_image(path), 56, "pad", MEAN)
    with ThreadPoolExecutor(8) as pool:
        for pixels in pool.map(lambda _: preprocess(load_image(path), 56, "pad", MEAN), range(24)):
            np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(("stored", "asked"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFC", "NFC")])
def test_names_in_another_unicode_form_are_found(tmp_path, stored, asked):
    """Archives made on macOS have e + U+0301 where JSON has U+00E9."""
    folder = tmp_path / unicodedata.normalize("NFC", "\u00fcber")
    folder.mkdir()
    Image.new("RGB", (3, 2), "red").save(folder / unicodedata.normalize(stored, "caf\u00e9.png"))
    name = unicodedata.normalize(asked, "\u00fcber/caf\u00e9.png")
    assert load_image(tmp_path / name).size == (3, 2)
    with pytest.raises(UserError, match="image .*caf.*s.png: No such file"):
        load_image(tmp_path / name.replace(".png", "s.png"))


def test_the_very_name_wins(tmp_path):
    for form, width in (("NFC", 1), ("NFD", 2)):
        Image.new("RGB", (width, 1)).save(tmp_path / unicodedata.normalize(form, "\u00e9.png"))
    for form, width in (("NFC", 1), ("NFD", 2)):
        assert load_image(tmp_path / unicodedata.normalize(form, "\u00e9.png")).width == width


def test_pointers_of_git_lfs_are_named(tmp_path):
    (tmp_path / "a.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    with pytest.raises(UserError, match="a.jpg: is a Git LFS pointer.*git lfs pull"):
        load_image(tmp_path / "a.jpg")


def test_files_are_bounded_before_they_are_read(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        os.truncate(file.fileno(), images.MAX_BYTES + 1)
    with pytest.raises(UserError, match="huge.png: is larger than 512 MiB"):
        load_image(tmp_path / "huge.png")


@pytest.mark.parametrize("name", tiny.IRREGULAR)
def test_only_regular_files_are_opened(tmp_path, name):
    (tmp_path / "images").mkdir()
    tiny.add_irregular(tmp_path / "images")
    with pytest.raises(UserError, match=f"^image .*{name}: (is a device, pipe or socket, not a file|Is a directory)"):
        load_image(tmp_path / "images" / name)


def test_names_of_many_spellings_end(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_image(tmp_path / ("\u00e9/" * 200 + "a.png"))


def test_a_bmp_of_many_short_runs_is_read():
    """Of 8-bit runs, two bytes each: a colour for 1 pixel at a time."""
    width, height = 64, 96
    rows = [b"".join(bytes([1, x + y]) for x in range(width)) for y in range(height)]
    runs = b"\0\0".join(rows) + b"\0\1"
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    offset = 14 + 40 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    data = b"BM" + struct.pack("<IHHI", offset + len(runs), 0, 0, offset) + header + palette + runs
    pixels = np.asarray(decode_image(data))[::-1, :, 0]
    np.testing.assert_array_equal(pixels, np.add.outer(np.arange(height), np.arange(width)))
