"""Small pictures of every kind that the processor reads, and what the reference makes of them.

processor/pictures.json lists for each file Pillow's mode and size, the SHA-256 of its RGB bytes (H, W, 3) after the
reference's conversion, the SHA-256 of its pixel values (f32, little-endian, CHW) at 32 and at 224, and for 224 the
sums of the resized bytes by channel and weighted by `index mod 65521` in (H, W, 3) order.
processor/expected.safetensors holds `NAME.rgb [H, W, 3]` and `NAME.resized [32, 32, 3]`, and `normalized [3, 256]`,
the pixel value of every byte in every channel.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from .common import FIXTURES, rng, sha256, write_json, write_tensors

DIRECTORY = FIXTURES / "processor"


def scene(width: int, height: int, name: str) -> np.ndarray:
    """Gradients, a disc, a bar and a little noise: [height, width, 4] u8, the last channel a soft alpha."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    u, v = x / max(width - 1, 1), y / max(height - 1, 1)
    image = np.stack([255 * u, 255 * v, 255 * (1 - u) * v, 255 * (1 - 0.8 * u * v)], axis=-1)
    disc = (u - 0.35) ** 2 + (v - 0.45) ** 2 < 0.05
    image[disc] = [230, 40, 60, 255]
    image[(u > 0.7) & (u < 0.85)] = [20, 90, 200, 60]
    image[..., :3] += rng(f"pictures/{name}").normal(0, 6, (height, width, 3))
    return image.round().clip(0, 255).astype(np.uint8)


def rgb(width: int, height: int, name: str) -> Image.Image:
    return Image.fromarray(scene(width, height, name)[..., :3], "RGB")


def rgba(width: int, height: int, name: str) -> Image.Image:
    return Image.fromarray(scene(width, height, name), "RGBA")


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, color: int, rows: list[bytes], extra: bytes = b"", interlace: int = 0) -> bytes:
    """PNG kinds that Pillow does not write. `rows` are unfiltered scanlines."""
    raw = b"".join(b"\0" + row for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def sixteen_bit(name: str, channels: int) -> np.ndarray:
    """[13, 19, channels] big-endian 16-bit samples whose low bytes matter to a rounding decoder."""
    picture = scene(19, 13, name).astype(np.uint16)[..., [0, 1, 2, 3][-channels:] if channels < 3 else slice(channels)]
    low = rng(f"pictures/{name}/low").integers(0, 256, picture.shape).astype(np.uint16)
    return (picture * 256 + low).astype(">u2")


def adam7(pixels: np.ndarray) -> list[bytes]:
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = []
    for y, x, dy, dx in passes:
        part = pixels[y::dy, x::dx]
        rows += [row.tobytes() for row in part] if part.size else []
    return rows


def exif_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def palette(image: Image.Image, colors: int) -> Image.Image:
    return image.convert("RGB").quantize(colors, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)


def pictures() -> dict[str, bytes]:
    files = {}

    # PNG
    files["rgb.png"] = encode(rgb(30, 20, "rgb"), "PNG")
    files["rgba.png"] = encode(rgba(21, 27, "rgba"), "PNG")
    files["grey.png"] = encode(rgb(25, 17, "grey").convert("L"), "PNG")
    files["grey_alpha.png"] = encode(rgba(17, 25, "grey_alpha").convert("LA"), "PNG")
    files["palette.png"] = encode(palette(rgb(22, 22, "palette"), 13), "PNG")
    files["palette_two_bits.png"] = encode(palette(rgb(23, 15, "palette_two_bits"), 4), "PNG", bits=2)
    files["palette_one_transparent.png"] = encode(palette(rgb(22, 16, "palette_one"), 13), "PNG", transparency=4)
    alphas = bytes([255, 0, 128, 77, 200, 13])
    files["palette_alphas.png"] = encode(palette(rgb(16, 22, "palette_alphas"), 13), "PNG", transparency=alphas)
    files["one_bit.png"] = encode(rgb(27, 19, "one_bit").convert("1"), "PNG")
    grey16 = (np.asarray(rgb(20, 14, "grey16").convert("L")).astype(np.uint16) * 3)  # some above 255, most below
    files["grey16.png"] = encode(Image.fromarray(grey16), "PNG")
    for name, channels, color in (("rgb16.png", 3, 2), ("rgba16.png", 4, 6), ("grey_alpha16.png", 2, 4)):
        files[name] = png(19, 13, 16, color, [row.tobytes() for row in sixteen_bit(name, channels)])
    for bits in (2, 4):
        levels = np.asarray(rgb(24, 10, f"grey{bits}").convert("L")) >> (8 - bits)
        packed = np.packbits(np.unpackbits(levels[..., None], axis=-1)[..., 8 - bits :].reshape(10, -1), axis=-1)
        files[f"grey_{bits}_bits.png"] = png(24, 10, bits, 0, [row.tobytes() for row in packed])
    grey = np.asarray(rgb(20, 20, "grey_key").convert("L"))
    key = int(grey[10, 10])
    files["grey_color_key.png"] = png(20, 20, 8, 0, [row.tobytes() for row in grey], chunk(b"tRNS", struct.pack(">H", key)))
    keyed = np.array(rgb(20, 20, "rgb_key"))
    keyed[5:12, 3:9] = [1, 2, 3]
    files["rgb_color_key.png"] = png(
        20, 20, 8, 2, [row.tobytes() for row in keyed], chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
    )
    files["interlaced.png"] = png(21, 19, 8, 2, adam7(np.asarray(rgb(21, 19, "interlaced"))), interlace=1)
    files["one_pixel.png"] = encode(rgb(1, 1, "one_pixel"), "PNG")
    files["three_high.png"] = encode(rgb(40, 3, "three_high"), "PNG")
    files["one_wide.png"] = encode(rgb(1, 33, "one_wide"), "PNG")
    files["tall.png"] = encode(rgb(9, 90, "tall"), "PNG")
    files["same_size.png"] = encode(rgb(32, 32, "same_size"), "PNG")
    files["same_width.png"] = encode(rgba(32, 45, "same_width"), "PNG")

    # JPEG
    files["444.jpg"] = encode(rgb(33, 26, "444"), "JPEG", quality=90, subsampling=0)
    files["422.jpg"] = encode(rgb(34, 23, "422"), "JPEG", quality=85, subsampling=1)
    files["420.jpg"] = encode(rgb(48, 32, "420"), "JPEG", quality=85, subsampling=2)
    files["420_odd.jpg"] = encode(rgb(17, 13, "420_odd"), "JPEG", quality=75, subsampling=2)
    files["420_coarse.jpg"] = encode(rgb(41, 37, "420_coarse"), "JPEG", quality=20, subsampling=2)
    files["grey.jpg"] = encode(rgb(25, 18, "grey_jpg").convert("L"), "JPEG", quality=80)
    files["progressive.jpg"] = encode(rgb(40, 28, "progressive"), "JPEG", quality=80, progressive=True, subsampling=2)
    files["rgb_components.jpg"] = encode(rgb(24, 24, "rgb_components"), "JPEG", quality=90, keep_rgb=True)
    files["cmyk.jpg"] = encode(rgb(26, 20, "cmyk").convert("CMYK"), "JPEG", quality=90)
    for value in range(2, 9):
        name = f"orientation_{value}.jpg"
        files[name] = encode(rgb(18, 12, "orientation"), "JPEG", quality=85, exif=exif_orientation(value))

    # WebP
    files["lossy.webp"] = encode(rgb(37, 29, "lossy"), "WEBP", quality=80, method=4)
    files["lossy_odd.webp"] = encode(rgb(15, 15, "lossy_odd"), "WEBP", quality=60, method=4)
    files["lossless.webp"] = encode(rgb(26, 22, "lossless"), "WEBP", lossless=True, method=4)
    files["lossy_alpha.webp"] = encode(rgba(24, 30, "lossy_alpha"), "WEBP", quality=80, alpha_quality=90, method=4)
    files["lossless_alpha.webp"] = encode(rgba(22, 22, "lossless_alpha"), "WEBP", lossless=True, exact=True, method=4)
    second = rgb(20, 16, "animated_second")
    files["animated.webp"] = encode(
        rgb(20, 16, "animated"), "WEBP", save_all=True, append_images=[second], duration=100, lossless=True, method=4
    )

    # GIF
    files["plain.gif"] = encode(palette(rgb(28, 18, "gif"), 16), "GIF")
    files["grey.gif"] = encode(rgb(18, 18, "grey_gif").convert("L"), "GIF")
    files["interlaced.gif"] = encode(palette(rgb(19, 23, "interlaced_gif"), 16), "GIF", interlace=1)
    files["transparent_two_frames.gif"] = encode(
        palette(rgb(24, 20, "gif_first"), 14), "GIF", save_all=True, transparency=3, duration=80, loop=0,
        append_images=[palette(rgb(24, 20, "gif_second"), 14)],
    )

    # BMP
    files["rgb.bmp"] = encode(rgb(19, 11, "bmp"), "BMP")
    files["palette.bmp"] = encode(palette(rgb(18, 12, "bmp_palette"), 16), "BMP")
    files["grey.bmp"] = encode(rgb(15, 11, "bmp_grey").convert("L"), "BMP")
    files["one_bit.bmp"] = encode(rgb(21, 9, "bmp_one_bit").convert("1"), "BMP")
    files["alpha.bmp"] = encode(rgba(14, 10, "bmp_alpha"), "BMP")
    return files


def processed(image: Image.Image, side: int) -> np.ndarray:
    """[3, side, side] f32 by the reference's image processor."""
    values = IdeficsImageProcessorPil(image_size=side)(image, return_tensors="pt")
    assert values.dtype == torch.float32 and values.shape == (1, 3, side, side)
    return values[0].numpy()


def transformers_4_rgb(image: Image.Image) -> np.ndarray:
    """The conversion of transformers 4.57: RGB is taken as it is, even with a transparent colour."""
    if image.mode == "RGB":
        return np.array(image)
    with_alpha = image.convert("RGBA")
    background = Image.new("RGBA", with_alpha.size, (255, 255, 255))
    return np.array(Image.alpha_composite(background, with_alpha).convert("RGB"))


def describe(data: bytes, tensors: dict, stem: str, table: np.ndarray) -> dict:
    image = Image.open(io.BytesIO(data))
    converted = convert_to_rgb(image, return_numpy=True)
    entry = {"mode": image.mode, "width": image.width, "height": image.height, "rgb_sha256": sha256(converted.tobytes())}
    if not np.array_equal(converted, transformers_4_rgb(image)):
        entry["transformers_4_rgb_sha256"] = sha256(transformers_4_rgb(image).tobytes())
    for side in (32, 224):
        values = processed(Image.open(io.BytesIO(data)), side)
        resized = np.asarray(Image.fromarray(converted).resize((side, side), Image.Resampling.BICUBIC))
        # The two ways to the pixel values agree: every value is a table entry of a resized byte.
        assert np.array_equal(values, np.stack([table[c][resized[..., c]] for c in range(3)])), stem
        entry[f"pixel_values_{side}_sha256"] = sha256(values.astype("<f4").tobytes())
        if side == 32:
            tensors[f"{stem}.resized"] = torch.from_numpy(resized.copy())
        else:
            flat = resized.reshape(-1).astype(np.int64)
            entry["sums_224"] = [int(resized[..., c].sum(dtype=np.int64)) for c in range(3)]
            entry["weighted_sum_224"] = int((flat * (np.arange(flat.size) % 65521)).sum())
    tensors[f"{stem}.rgb"] = torch.from_numpy(converted.copy())
    if image.getexif().get(0x0112, 1) != 1:
        upright = convert_to_rgb(ImageOps.exif_transpose(image), return_numpy=True)
        entry["upright_width"], entry["upright_height"] = upright.shape[1], upright.shape[0]
        entry["upright_rgb_sha256"] = sha256(upright.tobytes())
    return entry


def write_pictures() -> None:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    every_byte = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, -1))
    table = processed(every_byte, 16).reshape(3, 256)
    tensors = {"normalized": torch.from_numpy(table.copy())}
    entries = {}
    for name, data in pictures().items():
        (DIRECTORY / name).write_bytes(data)
        entries[name] = describe(data, tensors, name, table)
    write_tensors(DIRECTORY / "expected.safetensors", tensors)
    write_json(DIRECTORY / "pictures.json", entries)


def picture(name: str) -> Image.Image:
    return Image.open(Path(DIRECTORY / name))
