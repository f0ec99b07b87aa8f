"""Reading one image file as RGB, and resizing it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["PHOTO_MEAN", "PHOTO_STD", "SUFFIXES", "decode_rgb", "read_rgb", "resize", "stated_size"]

# ImageNet's channels (R, G, B), which serve for other photographs too.
PHOTO_MEAN = (123.675, 116.28, 103.53)
PHOTO_STD = (58.395, 57.12, 57.375)

# Pillow knows more formats, one of which starts another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


def read_rgb(path: str | Path) -> Tensor | str:
    """Return `decode_rgb` of a file, or what is wrong with it, in a line that names it."""
    try:
        return decode_rgb(path)
    except (OSError, ValueError) as error:
        return f"{str(path)!r} cannot be read ({_reason(error)})"


def stated_size(path: str | Path) -> tuple[int, int]:
    """Return the (height, width) that the head of an image file states; its pixels are not read.

    Raises:
        ValueError: the file cannot be read, in a line that names it.
    """
    pil = _pillow()
    try:
        with pil.open(path, formats=_FORMATS) as image:
            return image.height, image.width
    except pil.UnidentifiedImageError:
        raise ValueError(f"{str(path)!r} is not an image of a known format") from None
    except (OSError, ValueError, SyntaxError, EOFError, pil.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({_reason(error)})") from error


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (C, H, W), bilinear with antialiasing."""
    # Copies are left to NumPy here: PyTorch would start threads of its own in each of the loader's.
    # Pixels side by side (H, W, C) are what its resizing is fast on.
    pixels = torch.from_numpy(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    return interpolate(pixels.permute(2, 0, 1)[None], (height, width), mode="bilinear", antialias=True)[0]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("decoding images needs Pillow; install it: pip install pillow") from error
    return Image


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def decode_rgb(path: str | Path) -> Tensor:
    """Decode an image file to uint8 (3, H, W), by its content, whatever its name ends in.

    Pillow decodes outside the interpreter lock, so threads decode in parallel; torchvision.io, which
    does too, is deprecated. Gray, palette, CMYK and 16-bit images are converted, transparency is
    dropped, of several frames the first is taken, and an EXIF orientation is not applied (as in
    torchvision's ImageFolder). A file that ends early or holds nothing readable raises; damage that
    the decoder does not notice, such as some flipped bits of a JPEG, passes.

    Raises:
        OSError, ValueError: the file cannot be read or decoded.
    """
    pil = _pillow()
    data = Path(path).read_bytes()
    if not data:
        raise ValueError("the file is empty")
    try:
        with pil.open(io.BytesIO(data), formats=_FORMATS) as image:
            # Older versions of Pillow say I where newer ones say I;16.
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
                gray = (np.array(image).astype(np.int32) * 255 + 32767) // 65535
                return torch.from_numpy(gray.astype(np.uint8)).expand(3, -1, -1)
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} have no known range; convert the file to 8 or 16 bits")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except pil.UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None
    except (SyntaxError, EOFError, pil.DecompressionBombError) as error:  # what Pillow's formats raise
        raise ValueError(str(error) or type(error).__name__) from error
