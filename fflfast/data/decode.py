"""Decoding one image file to RGB."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["SUFFIXES", "decode_rgb"]

# Pillow knows more formats, one of which starts another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


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
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ValueError("decoding images needs Pillow; install it: pip install pillow") from error
    data = Path(path).read_bytes()
    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            # Older versions of Pillow say I where newer ones say I;16.
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
                gray = (np.array(image).astype(np.int32) * 255 + 32767) // 65535
                return torch.from_numpy(gray.astype(np.uint8)).expand(3, -1, -1)
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} have no known range; convert the file to 8 or 16 bits")
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None
    except (SyntaxError, EOFError, Image.DecompressionBombError) as error:  # what Pillow's formats raise
        raise ValueError(str(error) or type(error).__name__) from error
