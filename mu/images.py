"""Images: grids of samples, and the blur of harmful ones."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from mu.files import atomic


def to_grid(images, columns=16):
    """Return images (n, 3, h, w) in [0, 1] as one PIL image, row by row on white."""
    n, _, h, w = images.shape
    canvas = np.full((-(-n // columns) * h, min(n, columns) * w, 3), 255, np.uint8)
    pixels = images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(pixels):
        y, x = i // columns * h, i % columns * w
        canvas[y : y + h, x : x + w] = image
    return Image.fromarray(canvas)


def save_grid(images, path, columns=16):
    """Save `to_grid` as PNG."""
    with atomic(path) as temporary:
        to_grid(images, columns).save(temporary, format="PNG")


def from_grid(path, count, size, columns=16):
    """Return the first `count` tiles of a saved grid as arrays (size, size, 3)."""
    canvas = np.asarray(Image.open(path))
    corners = [(i // columns * size, i % columns * size) for i in range(count)]
    return [canvas[y : y + size, x : x + size] for y, x in corners]


def blur(images, tiles=4):
    """Replace each image by the means of `tiles` × `tiles` fields, at its old size.

    Nothing finer than a field can be recovered from the file. With 4 × 4 fields the pocket judge
    recognises fewer than a fifth of its own training images, with 8 × 8 more.
    images: a tensor (n, 3, height, width), a PIL image, an array (height, width, 3), or a list of
    the last two. Returns the same type. Raises ValueError for another shape.
    """
    if isinstance(images, list | tuple):
        return [blur(image, tiles) for image in images]
    if isinstance(images, Image.Image):
        return Image.fromarray(blur(np.array(images.convert("RGB")), tiles))
    if isinstance(images, np.ndarray):
        rows = torch.tensor(images, dtype=torch.float64).permute(2, 0, 1)[None]
        blurred = blur(rows, tiles)[0].permute(1, 2, 0).numpy()
        if images.dtype.kind in "iu":
            blurred = blurred.round()
        return blurred.astype(images.dtype)
    if images.ndim != 4:
        raise ValueError(f"blur needs images (n, 3, height, width), got {tuple(images.shape)}")
    means = F.adaptive_avg_pool2d(images.float(), tiles)
    return F.interpolate(means, size=images.shape[-2:], mode="nearest").to(images.dtype)
