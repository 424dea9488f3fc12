"""What files of every kind become, against pixels computed from the arrays that they were made of."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torch.nn.functional import interpolate

from fomal.data.images.image_format import ImageFormat, Remarks

pytestmark = pytest.mark.filterwarnings("error")  # files that are in order warn of nothing

RNG = np.random.default_rng(0)
H, W = 5, 7
GRAY = RNG.integers(0, 256, (H, W), np.uint8)
RGB = RNG.integers(0, 256, (H, W, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (H, W), np.uint8)
ALPHA[0, :2] = 0, 255
DEEP = RNG.integers(0, 65536, (H, W), np.uint16)
DEEP[0, :2] = 0, 65535
DEEP_RGB = RNG.integers(0, 65536, (H, W, 3), np.uint16)
PLACES = RNG.integers(0, 4, (H, W), np.uint8)
PALETTE = RNG.integers(0, 256, (4, 3), np.uint8)
KINDS = {".png": "PNG", ".jpg": "JPEG", ".bmp": "BMP", ".gif": "GIF", ".webp": "WEBP", ".tif": "TIFF", ".ppm": "PPM"}

same = np.testing.assert_array_equal


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: Image.Image | NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def png(values: NDArray[Any], color_type: int, **extra: bytes) -> bytes:
    """A PNG of 8 or 16 bits made by hand, with chunks that Pillow would not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 8 * values.itemsize, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in values)
    chunks = [chunk(b"IHDR", head), *(chunk(kind.encode(), data) for kind, data in extra.items())]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def palette_image() -> Image.Image:
    image = Image.frombytes("P", (W, H), PLACES.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image


def with_alpha(color: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.dstack([color, ALPHA]))


def to_rgb(gray: NDArray[Any]) -> NDArray[Any]:
    return np.broadcast_to(gray[..., None], (*gray.shape, 3))


def to_gray(rgb: NDArray[Any]) -> NDArray[Any]:
    """The weights of ITU-R BT.601, in fixed point."""
    return (rgb.astype(np.int64) @ np.array([19595, 38470, 7471]) + 2**15) >> 16


def over(color: NDArray[Any], alpha: NDArray[Any], background: int) -> NDArray[Any]:
    """Colour laid over the background."""
    share = alpha[..., None] / 255
    return np.rint(color * share + background * (1 - share))


def rgb(**changes: Any) -> ImageFormat:
    return ImageFormat(**{"height": H, "width": W, **changes})


# Every mode; the expectation is (H, W, 3)

BITS = GRAY > 127
EXACT: dict[str, tuple[bytes, NDArray[Any]]] = {
    "1 bit": (encoded(BITS), to_rgb(255 * BITS)),
    "1 bit TIFF": (encoded(BITS, "TIFF", compression="group4"), to_rgb(255 * BITS)),
    "PBM": (encoded(BITS, "PPM"), to_rgb(255 * BITS)),
    "gray": (encoded(GRAY), to_rgb(GRAY)),
    "PGM": (encoded(GRAY, "PPM"), to_rgb(GRAY)),
    "RGB": (encoded(RGB), RGB),
    "RGB BMP": (encoded(RGB, "BMP"), RGB),
    "RGB WebP": (encoded(RGB, "WEBP", lossless=True), RGB),
    "RGB TIFF": (encoded(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "palette": (encoded(palette_image()), PALETTE[PLACES]),
    "palette GIF": (encoded(palette_image(), "GIF"), PALETTE[PLACES]),
    "16 bits": (encoded(DEEP), to_rgb(DEEP >> 8)),
    "16 bits TIFF": (encoded(DEEP, "TIFF"), to_rgb(DEEP >> 8)),
    "16 bits big-endian TIFF": (encoded(Image.frombytes("I;16B", (W, H), DEEP.astype(">u2").tobytes()), "TIFF"),)
    + (to_rgb(DEEP >> 8),),
    "16 bits PGM": (f"P5 {W} {H} 65535\n".encode() + DEEP.astype(">u2").tobytes(), to_rgb(DEEP >> 8)),
    "16 bits in 32": (encoded(DEEP.astype(np.int32), "TIFF"), to_rgb(DEEP >> 8)),
    "16 bits RGB": (png(DEEP_RGB, 2), DEEP_RGB >> 8),
    "CMYK, no ink": (encoded(Image.new("CMYK", (W, H)), "TIFF"), np.full((H, W, 3), 255)),
    "CMYK, key": (encoded(Image.new("CMYK", (W, H), (9, 9, 9, 255)), "TIFF"), np.zeros((H, W, 3))),
}
LAID: dict[str, tuple[bytes, NDArray[Any], NDArray[Any]]] = {  # with alpha
    "gray, alpha": (encoded(with_alpha(GRAY)), to_rgb(GRAY), ALPHA),
    "RGB, alpha": (encoded(with_alpha(RGB)), RGB, ALPHA),
    "RGB, alpha, TIFF": (encoded(with_alpha(RGB), "TIFF"), RGB, ALPHA),
    "RGB, alpha, WebP": (encoded(with_alpha(RGB), "WEBP", lossless=True, exact=True), RGB, ALPHA),
    "16 bits, alpha": (png(np.dstack([DEEP, DEEP[::-1]]), 4), to_rgb(DEEP >> 8), DEEP[::-1] >> 8),
    "16 bits RGB, alpha": (png(np.dstack([DEEP_RGB, DEEP]), 6), DEEP_RGB >> 8, DEEP >> 8),
    "palette, one transparent": (encoded(palette_image(), transparency=2), PALETTE[PLACES], 255 * (PLACES != 2)),
    "palette GIF, one transparent": (
        encoded(palette_image(), "GIF", transparency=2),
        PALETTE[PLACES],
        255 * (PLACES != 2),
    ),
    "palette, alpha": (
        encoded(palette_image(), transparency=bytes([0, 99, 200, 255])),
        PALETTE[PLACES],
        np.array([0, 99, 200, 255])[PLACES],
    ),
    "gray, one transparent": (
        encoded(GRAY, transparency=int(GRAY[1, 1])),
        to_rgb(GRAY),
        255 * ~np.isin(GRAY, GRAY[1, 1]),
    ),
    "RGB, one transparent": (
        encoded(RGB, transparency=tuple(RGB[2, 3].tolist())),
        RGB,
        255 * (RGB - RGB[2, 3].astype(int)).any(-1),
    ),
    "16 bits, one transparent": (
        png(DEEP, 0, tRNS=struct.pack(">H", DEEP[1, 1])),
        to_rgb(DEEP >> 8),
        255 * ~np.isin(DEEP, DEEP[1, 1]),
    ),
}


@pytest.mark.parametrize("kind", EXACT)
def test_modes(kind: str) -> None:
    content, expected = EXACT[kind]
    decoded = rgb().decode(content)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    same(decoded, expected.transpose(2, 0, 1))
    gray = to_gray(expected)
    same(rgb(color="gray").decode(content), gray[None])
    same(rgb(color="binary", resample="nearest").decode(content), 255 * (gray >= 128)[None])


@pytest.mark.parametrize("background", [0, 100, 255])
@pytest.mark.parametrize("kind", LAID)
def test_alpha_is_laid_over_the_background(kind: str, background: int) -> None:
    content, color, alpha = LAID[kind]
    expected = over(color, alpha, background)
    decoded = rgb(background=background).decode(content).transpose(1, 2, 0)
    clear = np.isin(alpha, (0, 255))
    assert clear.any()
    same(decoded[clear], expected[clear])
    np.testing.assert_allclose(decoded, expected, atol=1)  # Pillow's alpha has 8 bits
    same(rgb(color="gray", background=background).decode(content)[0], to_gray(decoded))


def test_inks() -> None:
    """CMYK by the plain formula; as JPEG inverted, as Adobe's programs have it, and Pillow."""
    inks = (
        np.array([[10, 100, 200, 30], [0, 255, 17, 128]], np.uint8).repeat(16, 0)[:, None].repeat(16, 1)
    )  # (32, 16, 4)
    expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    image, wanted = Image.frombytes("CMYK", (16, 32), inks.tobytes()), ImageFormat(32, 16)
    np.testing.assert_allclose(wanted.decode(encoded(image, "TIFF")).transpose(1, 2, 0), expected, atol=1)
    photograph = encoded(image, "JPEG", quality=100, subsampling=0)
    np.testing.assert_allclose(wanted.decode(photograph).transpose(1, 2, 0), expected, atol=4)


def test_lab() -> None:
    """A grey of L* = 50.2 has the luminance ((50.2 + 16) / 116)^3 = 0.186, in sRGB 120."""
    decoded = rgb().decode(encoded(Image.new("LAB", (W, H), (128, 128, 128)), "TIFF"))
    np.testing.assert_allclose(decoded, 120, atol=2)


@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpeg(subsampling: int) -> None:
    y, x = np.mgrid[:64, :48]
    smooth = np.stack([2 * x + y, 255 - 3 * y, 4 * x], -1).astype(np.uint8)
    decoded = ImageFormat(64, 48).decode(encoded(smooth, "JPEG", quality=100, subsampling=subsampling))
    np.testing.assert_allclose(decoded.transpose(1, 2, 0).astype(int)[:, 4:-4], smooth[:, 4:-4], atol=12)
    gray = encoded(smooth[..., 0], "JPEG", quality=100)
    np.testing.assert_allclose(ImageFormat(64, 48, "gray").decode(gray)[0].astype(int), smooth[..., 0], atol=3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (GRAY.astype(np.float32), "^floating-point pixels, whose range is not defined: set value_range$"),
        (np.full((H, W), 65536, np.int32), "^pixels from 65536 to 65536, not of 16 bits: set value_range$"),
        (np.full((H, W), -1, np.int32), "^pixels from -1 to -1, not of 16 bits: set value_range$"),
    ],
)
def test_undefined_ranges_are_refused(image: NDArray[Any], message: str) -> None:
    for content in (encoded(image, "TIFF"), Image.fromarray(image)):
        with pytest.raises(ValueError, match=message):
            rgb().decode(content)


# Photographs that were turned, animations

TURNED: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {  # how each orientation is undone, by the EXIF standard
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,  # no such orientation
}


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


@pytest.mark.parametrize("orientation", TURNED)
def test_photographs_are_turned(orientation: int) -> None:
    expected = TURNED[orientation](RGB)
    wanted = ImageFormat(*expected.shape[:2])
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        content = encoded(RGB, kind, exif=exif(orientation), **options)
        same(wanted.decode(content).transpose(1, 2, 0), expected)
    blocks = RGB.repeat(16, 0).repeat(16, 1)  # one block of a JPEG for each pixel
    photograph = encoded(blocks, "JPEG", quality=100, exif=exif(orientation))
    wanted = ImageFormat(*(16 * side for side in expected.shape[:2]))
    np.testing.assert_allclose(wanted.decode(photograph).transpose(1, 2, 0)[8::16, 8::16].astype(int), expected, atol=4)


@pytest.mark.parametrize("data", [b"garbage, garbage", b"MM\0*\0\0\0\x08\0\x05\x01\x12"])
def test_unreadable_exif_data_say_nothing(data: bytes) -> None:
    flat = np.full((H, W, 3), 77, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about some
        for kind in ("PNG", "WEBP", "JPEG"):
            content = encoded(flat, kind, exif=b"Exif\0\0" * (kind == "JPEG") + data)
            same(rgb().decode(content).transpose(1, 2, 0), flat)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_animations_are_their_first_frame(kind: str, options: dict[str, Any]) -> None:
    frames = [Image.fromarray(noise(H, W, seed=seed)) for seed in range(3)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(content)) as image:
        assert image.n_frames == 3
    same(rgb().decode(content).transpose(1, 2, 0), np.asarray(frames[0]))


def test_jpeg_with_a_second_picture() -> None:
    images = [Image.fromarray(np.full((H, W, 3), value, np.uint8)) for value in (50, 200)]
    content = encoded(images[0], "MPO", save_all=True, append_images=images[1:])
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "MPO"
    same(rgb().decode(content, "x.jpg"), np.full((3, H, W), 50))


# Sizes


def nearest_places(size: int, wanted: int) -> NDArray[Any]:
    return ((np.arange(wanted) + 0.5) * size / wanted).astype(int)


@pytest.mark.parametrize("size", [(4, 8), (8, 4), (4, 4), (12, 6), (2, 5), (3, 3)])
@pytest.mark.parametrize("color", ["rgb", "gray", "binary"])
def test_crop_stretch_and_pad(color: Any, size: tuple[int, int]) -> None:
    """With "nearest", every pixel comes from a known place."""
    height, width = size
    image = noise(height, width)
    wanted = ImageFormat(4, 4, color, resample="nearest", background=100)
    pixels = ImageFormat(height, width, color, resample="nearest").decode(image)  # (C, height, width)

    def taken(rows: NDArray[Any], columns: NDArray[Any]) -> NDArray[Any]:
        return pixels[:, rows][:, :, columns]

    stretched = ImageFormat(4, 4, color, "stretch", "nearest").decode(image)
    same(stretched, taken(nearest_places(height, 4), nearest_places(width, 4)))
    side = min(size)
    top, left = (height - side) / 2, (width - side) / 2
    middle = ((np.arange(4) + 0.5) * side / 4 + shift for shift in (top, left))
    same(wanted.decode(image), taken(*(places.astype(int) for places in middle)))
    inner = [round(4 * length / max(size)) for length in size]  # as large as fits
    expected = np.full((len(pixels), 4, 4), 0 if color == "binary" else 100)  # the background, cut as the image is
    first = [round((4 - length) / 2) for length in inner]
    expected[:, first[0] : first[0] + inner[0], first[1] : first[1] + inner[1]] = taken(
        nearest_places(height, inner[0]), nearest_places(width, inner[1])
    )
    same(ImageFormat(4, 4, color, "pad", "nearest", background=100).decode(image), expected)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(60, 40), (7, 9), (21, 200)])
def test_resampling_is_that_of_torch(resample: Any, size: tuple[int, int]) -> None:
    image = noise(*size) // 4 + 90  # Pillow cuts what bicubic overshoots twice
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    y = interpolate(x, (21, 15), mode=resample, antialias=True, align_corners=False)[0]
    decoded = ImageFormat(21, 15, fit="stretch", resample=resample).decode(image)
    np.testing.assert_allclose(decoded, y.clamp(0, 255).numpy(), atol=1.01)


def test_lanczos_differs_and_keeps_the_mean() -> None:
    image = noise(64, 64) // 5 + 100
    lanczos, bicubic = (ImageFormat(16, 16, resample=kind).decode(image) for kind in ("lanczos", "bicubic"))
    assert (lanczos != bicubic).any()
    np.testing.assert_allclose(lanczos.mean((1, 2)), image.mean((0, 1)), atol=1)


def test_large_photographs_are_decoded_at_a_lower_scale() -> None:
    """Which is quicker, and nearly the same."""
    coarse = Image.fromarray(noise(30, 40))
    content = encoded(coarse.resize((1200, 900), Image.Resampling.BICUBIC), "JPEG", quality=95)
    for wanted in (ImageFormat(84, 84), ImageFormat(84, 84, fit="pad"), ImageFormat(50, 84, "gray", "stretch")):
        with Image.open(io.BytesIO(content)) as image:
            full = wanted.decode(np.asarray(image)).astype(int)
        decoded = wanted.decode(content).astype(int)
        assert (decoded != full).any()
        assert np.abs(decoded - full).mean() < 1
        assert np.abs(decoded - full).max() < 16
    thin = encoded(coarse.resize((1200, 60)), "JPEG")  # a lower scale would lose what 84 rows need
    with Image.open(io.BytesIO(thin)) as image:
        same(ImageFormat(84, 84).decode(thin), ImageFormat(84, 84).decode(np.asarray(image)))


def test_photographs_of_50_megapixels_pass() -> None:
    """And of more: cameras have 102, telephones 108."""
    photograph = Image.new("RGB", (8700, 5800), (10, 200, 30))
    decoded = ImageFormat(20, 20).decode(encoded(photograph, "JPEG"), "x.jpg")
    np.testing.assert_allclose(decoded.reshape(3, -1), np.array([[10], [200], [30]]).repeat(400, 1), atol=2)
    blank = Image.new("1", (12000, 9000))
    same(ImageFormat(20, 20, "gray").decode(encoded(blank), "x.png"), np.zeros((1, 20, 20)))


# What is refused


def test_pixels_are_limited_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(RGB)
    same(rgb(max_pixels=H * W).decode(content).transpose(1, 2, 0), RGB)

    def load(image: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ValueError, match="decoded"):
        rgb(max_pixels=H * W).decode(content)
    with pytest.raises(ValueError, match=f"^{W} x {H} pixels, more than max_pixels={H * W - 1}$"):
        rgb(max_pixels=H * W - 1).decode(content)
    head = png(np.zeros((1, 1), np.uint8), 0)
    for width, height in ((12000, 12000), (30000, 30000)):
        data = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        bomb = head[:16] + data + struct.pack(">I", zlib.crc32(b"IHDR" + data)) + head[33:]
        assert len(bomb) < 100
        with pytest.raises(ValueError, match=f"^{width} x {height} pixels, more than max_pixels=128000000$"):
            rgb().decode(bomb, "bomb.png")


def test_a_bomb_in_an_animation() -> None:
    """A GIF's frame may be larger than the GIF."""
    content = bytearray(encoded(palette_image(), "GIF"))
    place = content.index(b"\x2c\0\0\0\0") + 5  # width and height of the frame
    content[place : place + 4] = struct.pack("<HH", 9000, 9000)
    with pytest.raises(ValueError, match="^9000 x 9000 pixels, more than max_pixels"):
        rgb(max_pixels=50_000_000).decode(bytes(content))


@pytest.mark.filterwarnings("ignore")  # Pillow's, about some
@pytest.mark.parametrize("suffix", KINDS)
def test_truncated_files_are_refused(suffix: str) -> None:
    image = noise(40, 40)
    content = encoded(image, KINDS[suffix])
    assert rgb().decode(content, f"x{suffix}").shape == (3, H, W)
    message = r"^(damaged[:,] ..|no image of a known kind$)"
    for keep in (0, 0.02, 0.3, 0.6, 0.95):
        with pytest.raises(ValueError, match=message):
            rgb().decode(content[: int(keep * len(content))], f"x{suffix}")


@pytest.mark.parametrize(
    "content", [b"", b"text", b"<!DOCTYPE html><html></html>", bytes(1000), b"%!PS-Adobe-3.0 EPSF-3.0"]
)
def test_no_images(content: bytes) -> None:
    with pytest.raises(ValueError, match="^no image of a known kind$"):
        rgb().decode(content, "x.png")


def test_random_damage_is_a_value_error() -> None:
    messages, rng = [], np.random.default_rng(0)
    for kind in KINDS.values():
        content = encoded(RGB, kind)
        for _ in range(60):
            damaged = bytearray(content)
            for place in rng.integers(0, len(damaged), 4):
                damaged[place] = rng.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert rgb().decode(bytes(damaged)).shape == (3, H, W)
                except ValueError as error:
                    messages.append(str(error))
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("kind", KINDS.values())
def test_names_that_say_another_kind_are_noted(kind: str) -> None:
    content = encoded(RGB, kind)
    expected = rgb().decode(content)
    for suffix, promised in (*KINDS.items(), (".JPEG", "JPEG"), (".Tiff", "TIFF"), (".pgm", "PPM"), (".jfif", "JPEG")):
        remarks, name = Remarks(), f"folder.png/x{suffix}"
        same(rgb().decode(content, name, remarks), expected)
        assert remarks.misnamed == ({} if promised == kind else {name: kind})
    for name in ("", "x", "x.dat", "png", "x.jpg.txt"):
        remarks = Remarks()
        same(rgb().decode(content, name, remarks), expected)
        assert remarks == Remarks()


# Arrays and Pillow's images


def test_arrays() -> None:
    same(rgb().decode(RGB).transpose(1, 2, 0), RGB)
    same(rgb(color="gray").decode(GRAY)[0], GRAY)
    same(rgb(color="gray").decode(GRAY[..., None])[0], GRAY)
    same(ImageFormat(H, 1, "gray").decode(GRAY[:, :1])[0], GRAY[:, :1])  # (H, 1) is an image of one column
    same(ImageFormat(H, 1, "gray").decode(GRAY[:, :1, None])[0], GRAY[:, :1])
    clear = with_alpha(RGB)
    same(rgb(background=9).decode(np.asarray(clear)), rgb(background=9).decode(encoded(clear)))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((H, W), object),
        np.zeros((H, W), complex),
        np.zeros((H, W), "U3"),
        *(np.zeros(shape, np.uint8) for shape in [(H, W, 2), (H, W, 5), (3, H, W), (H,), (), (0, W), (1, H, W, 3)]),
    ],
    ids=lambda array: f"{array.shape} {array.dtype}",
)
def test_arrays_of_another_kind(array: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"^shape \(.*\), .*: give \(H, W\), \(H, W, 1\), \(H, W, 3\) or"):
        rgb().decode(array)


def test_images_of_pillow_stay_as_they_are() -> None:
    with Image.open(io.BytesIO(encoded(RGB, exif=exif(6)))) as image:
        for _ in range(2):
            same(ImageFormat(W, H).decode(image).transpose(1, 2, 0), np.rot90(RGB, -1))
        assert image.size == (W, H)
        same(np.asarray(image), RGB)


def test_threads_decode_the_same() -> None:
    contents = [encoded(noise(90, 70, seed=seed), kind) for kind in KINDS.values() for seed in range(5)]
    contents += [content for content, _ in EXACT.values()] + [content for content, *_ in LAID.values()]
    wanted = ImageFormat(20, 20, background=7)
    one = [wanted.decode(content) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, expected in zip(pool.map(wanted.decode, contents), one, strict=True):
                same(found, expected)


# Values and settings


@pytest.mark.parametrize(
    ("mean", "std"), [([0.0], [1.0]), ([0.5], [0.25]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.0], [2.0])]
)
def test_normalize(mean: list[float], std: list[float]) -> None:
    x = torch.from_numpy(noise(8 * H, W).reshape(2, 4, 3, H, W))
    y = rgb(mean=mean, std=std).normalize(x)
    assert y.dtype == torch.float32
    shape = (-1, 1, 1)
    expected = (x.numpy() / 255 - np.reshape(mean, shape)) / np.reshape(std, shape)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_equal_formats_are_equal() -> None:
    assert rgb(mean=[0.5], std=[1, 2, 3]) == rgb(mean=(0.5,), std=(1, 2, 3))
    assert hash(rgb(mean=[0.5])) == hash(rgb(mean=(0.5,)))
    assert [rgb(color=color, resample="nearest").channels for color in ("rgb", "gray", "binary")] == [3, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 0}, r"^height=0 must be at least 1\.$"),
        ({"width": -3}, r"^width=-3 must be at least 1\.$"),
        ({"height": 10**9}, r"^height=1000000000 and width=7 are more than 128000000 pixels: use smaller images\.$"),
        ({"max_pixels": 0}, r"^max_pixels=0 must be at least 1\.$"),
        ({"color": "grey"}, r"^color='grey' is unknown: use one of rgb, gray, binary\.$"),
        ({"fit": "squash"}, r"^fit='squash' is unknown: use one of crop, stretch, pad\.$"),
        ({"resample": "cubic"}, r"^resample='cubic' is unknown: use one of nearest, bilinear, bicubic, lanczos\.$"),
        ({"color": "binary"}, r"^resample='bilinear' makes greys of color='binary': use resample: nearest\.$"),
        ({"background": 256}, r"^background=256 is no grey level: use 0 \(black\) to 255 \(white\)\.$"),
        ({"background": -1}, r"^background=-1 is no grey level"),
        ({"mean": [1, 2]}, r"^mean=\[1, 2\] has 2 values for 3 channels: give one for each channel, or one for all\.$"),
        ({"std": []}, r"^std=\[\] has 0 values for 3 channels"),
        ({"color": "gray", "std": [1, 1, 1]}, r"^std=\[1, 1, 1\] has 3 values for 1 channels"),
        ({"std": [1, 0, 1]}, r"^std=\[1, 0, 1\] must be positive\.$"),
        ({"std": [1, float("nan"), 1]}, r"^std=\[1, nan, 1\] must be a list of finite numbers\.$"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rgb(**settings)
