"""Small photos of every kind that a decoder meets: formats, colours, orientations, damage."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

# Colorants of ICC profiles, as columns XYZ of red, green and blue under D50.
SRGB = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
WIDE = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Encodes an image."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def colours(height: int = 12, width: int = 20) -> Image.Image:
    """Returns a photo whose colours differ along both sides, so that every turn shows."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / width, y * 255 / height, 255 - x * 200 / width], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def icc_profile(colorants: np.ndarray | None, gamma: float) -> bytes:
    """Returns an ICC profile (version 2) of one gamma: RGB of these colorants, or of grey."""

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    tags = {b"wtpt": xyz(np.array([0.9642, 1.0, 0.8249]))}
    if colorants is None:
        tags[b"kTRC"] = curve
    else:
        for i, name in enumerate((b"r", b"g", b"b")):
            tags[name + b"XYZ"], tags[name + b"TRC"] = xyz(colorants[:, i]), curve
    name = b"test\0"
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(79)
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    space = b"GRAY" if colorants is None else b"RGB "
    size = offset + len(body)
    header = struct.pack(">I4xI", size, 0x02400000) + b"mntr" + space + b"XYZ " + bytes(12)
    header += b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


def damaged_exif() -> bytes:
    """Returns EXIF with orientation 6, a resolution of a wrong type and a division by zero."""
    entries = [
        (0x0112, 3, 1, struct.pack("<HH", 6, 0)),
        (0x011A, 2, 4, b"72\0\0"),
        (0x011B, 3, 1, struct.pack("<HH", 72, 0)),
        (0x9003, 5, 1, struct.pack("<I", 8 + 2 + 12 * 4 + 4)),
    ]
    fields = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 4) + fields + struct.pack("<III", 0, 0, 0)


def unwritable_exif() -> bytes:
    """Returns EXIF with orientation 6 and a field that Pillow reads but cannot write back."""
    fields = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x9999, 16, 1, 38)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + fields + struct.pack("<IQ", 0, 2**63)


def photo_zoo() -> dict[str, bytes]:
    """Returns photos by name; those named "refused" must not be decoded."""
    photo, grey = colours(), np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    rgba = photo.convert("RGBA")
    rgba.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 20).astype(np.uint8), (12, 1))))
    palette = photo.quantize(16)
    wide, linear_grey = icc_profile(WIDE, 2.2), icc_profile(None, 1.0)
    zoo = {
        f"photo.{kind}": saved(photo, kind, **({"lossless": True} if kind == "WEBP" else {}))
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    }
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        zoo[f"orientation {orientation}"] = saved(photo, "JPEG", exif=exif)
    zoo |= {
        "orientation of a PNG": saved(photo, "PNG", exif=exif),
        "damaged EXIF": saved(photo, "JPEG", exif=damaged_exif()),
        "EXIF that cannot be written back": saved(photo, "JPEG", exif=unwritable_exif()),
        "EXIF that is nonsense": saved(photo, "JPEG", exif=b"Exif\0\0nonsense"),
        "16-bit grey": saved(Image.fromarray(grey)),
        "16-bit grey TIFF": saved(Image.fromarray(grey), "TIFF"),
        "32-bit grey TIFF": saved(Image.fromarray(grey.astype(np.int32)), "TIFF"),
        "8-bit grey": saved(photo.convert("L"), "JPEG"),
        "one bit": saved(photo.convert("1")),
        "RGBA": saved(rgba),
        "RGBA WebP": saved(rgba, "WEBP", lossless=True),
        "grey and alpha": saved(rgba.convert("LA")),
        "palette": saved(palette),
        "palette with a transparent colour": saved(palette, transparency=3),
        "GIF with a transparent colour": saved(palette, "GIF", transparency=3),
        "RGB with a transparent colour": saved(photo, transparency=photo.getpixel((3, 3))),
        "CMYK JPEG": saved(photo.convert("CMYK"), "JPEG"),
        "CMYK TIFF": saved(photo.convert("CMYK"), "TIFF"),
        "progressive": saved(photo, "JPEG", progressive=True),
        "animation": saved(photo, "GIF", save_all=True, append_images=[palette.convert("RGB")]),
        "wide colours": saved(photo, "JPEG", icc_profile=wide),
        "wide colours, upright": saved(photo, "JPEG", icc_profile=wide, exif=damaged_exif()),
        "wide colours and alpha": saved(rgba, icc_profile=wide),
        "wide colours of a palette": saved(palette, icc_profile=wide),
        "linear grey": saved(photo.convert("L"), icc_profile=linear_grey),
        "linear 16-bit grey": saved(Image.fromarray(grey), icc_profile=linear_grey),
        "linear grey and alpha": saved(rgba.convert("LA"), icc_profile=linear_grey),
        "profile of another colour space": saved(photo, icc_profile=linear_grey),
        "CMYK with an RGB profile": saved(photo.convert("CMYK"), "JPEG", icc_profile=wide),
        "damaged profile": saved(photo, icc_profile=wide[:150]),
        "profile of nonsense": saved(photo, icc_profile=b"nonsense"),
    }
    whole = saved(photo, "JPEG")
    return zoo | {
        "refused: floating point": saved(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"),
        "refused: truncated": whole[: len(whole) * 2 // 3],
        "refused: other format": saved(photo, "PPM"),
        "refused: text": b"hello",
        "refused: empty": b"",
    }
