"""Images of any size with about the detail of a photograph."""

import io

import numpy as np
from PIL import Image


def photo(seed: int, width: int, height: int) -> bytes:
    """A JPEG with about the detail of a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (height // 40, width // 40, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-6, 7, (height, width, 1), dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()
