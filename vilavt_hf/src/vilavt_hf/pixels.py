"""From an image to the numbers of its patches: the image processor's, bit for bit, without its passes over all pixels.

A byte has 256 values, so what the image processor makes of one is looked up in a table, which is asked of it, whatever
its settings. Pixels stay bytes until then, and each is there once, not once for each frame of a patch.

Shapes: N patches of 14 x 14 pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vilavt_core.regions import smart_resize


def patches_of(
    image: Image.Image, image_processor: Any, bounds: tuple[int, int] | None = None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """An image at the encoder's size, cut into patches, as the image processor would before it scales them.

    Args:
        image: RGB.
        image_processor: says the size of a patch, how many are merged, and how images are resized.
        bounds: (min, max) pixels; None: the image has a size that the encoder takes.

    Returns:
        (N, 588) uint8, a patch's channels one after the other, in the order of merged patches; (1, rows, columns) of
        the grid of patches.
    """
    patch, merge = image_processor.patch_size, image_processor.merge_size
    if bounds is not None:
        height, width = smart_resize(image.height, image.width, min_pixels=bounds[0], max_pixels=bounds[1])
        if (image.width, image.height) != (width, height):
            image = image.resize((width, height), image_processor.resample)
    rows, columns = image.height // patch, image.width // patch
    cells = np.asarray(image).reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    return cells.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1), (1, rows, columns)


def pixel_table(image_processor: Any) -> np.ndarray:
    """What the image processor makes of a byte of each channel, (3, 256) float32: asked for, whatever its settings."""
    side = image_processor.patch_size * image_processor.merge_size
    values = np.resize(np.arange(256, dtype=np.uint8), (side, side))
    picture = Image.fromarray(np.repeat(values[..., None], 3, axis=-1))
    scaled = image_processor(images=[picture], return_tensors="pt", do_resize=False)["pixel_values"].numpy()
    given, _ = patches_of(picture, image_processor)
    scaled = scaled.reshape(len(given), 3, image_processor.temporal_patch_size, -1)[:, :, 0]
    table = np.empty((3, 256), dtype=np.float32)
    for channel, (pixels, made) in enumerate(zip(np.hsplit(given, 3), scaled.swapaxes(0, 1), strict=True)):
        table[channel, pixels] = made
    return table


class PixelScale(torch.nn.Module):
    """Bytes of patches as the numbers that the vision tower takes, bit for bit those of the image processor.

    Args:
        image_processor: the checkpoint's.
        dtype: of the tower.
    """

    table: torch.Tensor

    def __init__(self, image_processor: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.frames = int(image_processor.temporal_patch_size)
        table = torch.from_numpy(pixel_table(image_processor)).to(dtype)
        self.register_buffer("table", table.to(torch.get_default_device()), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 588) uint8 -> (N, 1176): a still image is as many equal frames as a patch has."""
        channels = self.table.shape[0]
        starts = torch.arange(channels, dtype=torch.int32, device=self.table.device) * self.table.shape[1]
        places = pixels.to(self.table.device).unflatten(1, (channels, -1)).int() + starts[:, None]
        scaled = self.table.flatten().index_select(0, places.flatten()).view(places.shape)
        return scaled[:, :, None].expand(-1, -1, self.frames, -1).reshape(len(pixels), -1)


def pixel_values(images: Sequence[Image.Image], image_processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the image processor returns for images that have the size the encoder takes.

    Returns:
        (N, 1176) float32; (n, 3) grids of patches.
    """
    rgb = (image if image.mode == "RGB" else image.convert("RGB") for image in images)
    patches, grids = zip(*(patches_of(image, image_processor) for image in rgb), strict=True)
    scale = PixelScale(image_processor, torch.float32)
    return scale(torch.from_numpy(np.concatenate(patches))), torch.tensor(grids)
