"""Images for simulated attackers: drawn by the original model and augmented.

A real attacker has other images than the defender. Attackers that are simulated on the defender's
few images alone prepare the model for these images only.
"""

import json

import torch
import torch.nn.functional as F

from mu.concepts.sets import cached, encode_images
from mu.models import encode_prompts, select, text_encoders
from mu.sampling import draw_images, images_per_batch


def augment(image, generator):
    """Return an image (3, height, width) in [−1, 1], varied at random.

    Mirrored, scaled to 75 to 115 %, shifted by up to 15 %, with mixed color channels and another
    contrast. What lies outside the image is white.
    """

    def uniform(low=0.0, high=1.0):
        return low + (high - low) * torch.rand((), generator=generator).item()

    if uniform() < 0.5:
        image = image.flip(-1)
    if uniform() < 0.6:
        scale = uniform(0.75, 1.15)
        shift = [uniform(-0.3, 0.3), uniform(-0.3, 0.3)]
        matrix = torch.tensor([[1 / scale, 0, shift[0]], [0, 1 / scale, shift[1]]])[None]
        grid = F.affine_grid(matrix, (1, *image.shape), align_corners=False)
        image = 1 - F.grid_sample(1 - image[None], grid, align_corners=False)[0]
    if uniform() < 0.5:
        share, order = uniform(0.35, 1.0), torch.randperm(3, generator=generator)
        image = share * image + (1 - share) * image[order]
    if uniform() < 0.3:
        image = (image * uniform(0.6, 1.2)).clamp(-1, 1)
    return image


@torch.no_grad()
def rehearsal_set(pipe, prompts, count, seed=0, guidance=4.0, steps=12, cache=None):
    """Return a `ConceptSet` of `count` images that the pipeline draws of the forget set's prompts.

    Each is augmented. The set is cached in a folder.
    """
    size, scale = pipe.unet.config.sample_size, pipe.vae.config.scaling_factor
    captions = [prompts[i % len(prompts)] for i in range(count)]
    key = json.dumps(["augmented", captions, seed, guidance, steps, size, scale]).encode()

    def make():
        rows = select(encode_prompts(pipe, prompts), torch.arange(count) % len(prompts))
        seeds = range(10**6 * (seed + 1), 10**6 * (seed + 1) + count)
        sampling = (seeds, guidance, steps, images_per_batch(pipe))
        images = draw_images(pipe, rows, encode_prompts(pipe, [""]), *sampling)
        generator = torch.Generator().manual_seed(seed)
        images = torch.stack([augment(image * 2 - 1, generator) for image in images])
        return encode_images(pipe, images, captions)

    parts = (pipe.unet, pipe.vae, *text_encoders(pipe))
    return cached(make, captions, pipe.unet.device, cache, "rehearsal", key, *parts)
