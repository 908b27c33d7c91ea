"""A photograph as patches, row by row, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def load(path: Path | None) -> Tensor:
    """Float32 [height, width, 3] in 0..1; without a path the portrait of Grace Hopper (United
    States Navy, public domain) that matplotlib brings.

    Raises:
        OSError: no picture can be read there.
    """
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    # get_sample_data gives a path as it stands where it is not asked to open it.
    source = path or get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(source) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)


def grid_of(photograph: Tensor, size: int) -> tuple[int, int]:
    """Whole patches down and across; what is left at the border is cut off."""
    height, width, _ = photograph.shape
    return height // size, width // size


def patches(photograph: Tensor, size: int) -> Tensor:
    """[patches, size * size * 3], in row-major order."""
    rows, columns = grid_of(photograph, size)
    cut = photograph[: rows * size, : columns * size]
    parts = cut.reshape(rows, size, columns, size, 3).permute(0, 2, 1, 3, 4)
    return parts.reshape(rows * columns, -1).contiguous()


def picture(parts: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """[height, width, 3] from patches."""
    rows, columns = grid
    found = parts.reshape(rows, columns, size, size, 3).permute(0, 2, 1, 3, 4)
    return found.reshape(rows * size, columns * size, 3)
