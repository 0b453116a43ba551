"""Distances between images: FID, its analogue on the judge's features, LPIPS.

Each distance comes with facts for its card. Images are tensors (n, 3, height, width) in [0, 1], or
folders of PNG and JPEG files. Only the libraries that own pretrained weights download anything.
"""

import contextlib
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import eigvals
from tqdm import tqdm

from mu.extras import extra
from mu.files import digest
from mu.images import open_image, readable

MIN_IMAGES = 64  # with fewer, a Fréchet distance depends on their number more than on their content


def image_files(folder):
    """Return the PNG and JPEG files of a folder, sorted.

    Raises FileNotFoundError for a folder without images and ValueError for a broken image.
    """
    suffixes = (".png", ".jpg", ".jpeg")
    files = [file for file in Path(folder).glob("*") if file.suffix.lower() in suffixes]
    files = sorted(file for file in files if not file.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"{folder} has no images: PNG or JPEG files are needed")
    for file in files:
        with readable(file), Image.open(file) as image:
            image.load()
    return files


def check_finite(images):
    """Raise ValueError if images hold NaN or infinite values."""
    if not torch.isfinite(images).all():
        raise ValueError("images hold NaN or infinite values: the model that drew them diverged")


def check_images(images):
    """Return the images (n, 3, height, width).

    Raises ValueError for another shape, no images, NaN, and values outside [0, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images must be (n, 3, height, width), n ≥ 1, got {tuple(images.shape)}")
    check_finite(images)
    low, high = images.min(), images.max()
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"images must be within [0, 1], got [{low:g}, {high:g}]")
    return images


def frechet(a, b):
    """Return the squared Fréchet distance of two feature sets (n, width), taken as normal.

    ‖μ_a − μ_b‖² + tr(S_a + S_b − 2 (S_a S_b)^½), with unbiased covariances S. The trace of the root
    is the sum of the square roots of the eigenvalues of S_a S_b.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(distance + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def small_sample_note(name, counts, width, least):
    """Return a warning for the card if there are few images, else "".

    Raises ValueError for fewer than `least`.
    """
    few, rank = min(counts), width + 1
    if few < least:
        raise ValueError(
            f"{name} of {few} images is not meaningful: use at least {least} on each side, better "
            f"{rank}, which make the covariance full-rank"
        )
    if few > width:
        return ""
    return (
        f"few images: biased upwards, compare only with {name} of as many "
        f"(rank of the covariance needs {rank})"
    )


def check_fid_inputs(images, reference, least=MIN_IMAGES):
    """Return (numbers of images, small-sample note, the torch-fidelity module).

    Allows `fid` to fail before anything is drawn. images, reference: a folder, or the number of
    images it will have. Raises as `fid` does.
    """
    counts = [n if isinstance(n, int) else len(image_files(n)) for n in (images, reference)]
    note = small_sample_note("FID", counts, 2048, least)
    return counts, note, extra("torch_fidelity", "torch-fidelity")


class ImageFiles(torch.utils.data.Dataset):
    """Images of a folder as torch-fidelity takes them, bytes (3, height, width).

    The files are those of `image_files`: torch-fidelity's own list has hidden ones as well.
    """

    def __init__(self, folder, transform):
        self.files, self.transform = image_files(folder), transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.transform(open_image(self.files[i]))


def fid(images, reference, size, weights=None, batch_size=32, least=MIN_IMAGES):
    """Return FID (Heusel et al. 2017) of two folders by torch-fidelity: ({"fid"}, card facts).

    size: all images are resized by their shorter side and cropped to it. weights: file of
    torch-fidelity's Inception, where it cannot be downloaded. Raises as `image_files` does,
    ImportError without the package, and ValueError for fewer than `least` images.
    """
    counts, note, fidelity = check_fid_inputs(images, reference, least)
    transforms = extra("torchvision.transforms", "torchvision")
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    transform = transforms.Compose(steps)
    with contextlib.redirect_stderr(sys.stdout):  # its progress bars
        found = fidelity.calculate_metrics(
            input1=ImageFiles(images, transform),
            input2=ImageFiles(reference, transform),
            fid=True,
            cuda=torch.cuda.is_available(),
            batch_size=batch_size,
            cache=False,
            verbose=True,
            feature_extractor_weights_path=weights,
        )
    inception = "its own weights" if weights is None else digest(weights)
    return {"fid": found["frechet_inception_distance"]}, {
        "fid_backend": f"torch-fidelity {version('torch-fidelity')}, {inception}",
        "fid_size": size,
        "fid_images": counts[0],
        "fid_reference": f"{counts[1]} images ({digest(reference)})",
        "fid_marked": note,
    }


@torch.no_grad()
def judge_features(judge, images, batch_size=128):
    """Return the pooled features (n, width) that the pocket judge's classifier reads.

    Raises as `check_images` does, and TypeError for another judge.
    """
    if not hasattr(judge, "resnet"):
        raise TypeError(
            f"{type(judge).__name__} has no features: only the pocket judge has JFD and change; "
            "leave `judge` empty, and name `clip` or `nudenet`"
        )
    pixels = check_images(images).float()
    if images.shape[-1] != 64:
        pixels = F.interpolate(pixels, size=(64, 64), mode="area")
    parts = [judge.resnet(part * 2 - 1).pooler_output for part in pixels.split(batch_size)]
    return torch.cat(parts).flatten(1)


def judge_distance(a, b, least=MIN_IMAGES):
    """Return JFD, the `frechet` distance of `judge_features`: ({"jfd"}, card facts).

    The analogue of FID for pocket models, on another scale. Raises ValueError for fewer than
    `least` images.
    """
    note = small_sample_note("JFD", (len(a), len(b)), a.shape[1], least)
    facts = {"jfd_images": f"{len(a)} and {len(b)}, {a.shape[1]} features", "jfd_marked": note}
    return {"jfd": max(0.0, frechet(a, b))}, facts


def judge_change(before, after):
    """Return 1 − cosine of the `judge_features` of each image pair, (n,); 0: unchanged.

    A pair has the same prompt and seed. The analogue of LPIPS for pocket models.
    Raises ValueError for unpaired features.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"images before and after must be pairs, got {len(before)} and {len(after)}"
        )
    return 1 - F.cosine_similarity(before, after, dim=1)


def lpips_network(net="alex", **options):
    """Return the network of LPIPS (Zhang et al. 2018).

    torchvision downloads its trunk on first use. Raises ImportError without the package.
    """
    network = extra("lpips", "lpips").LPIPS(net=net, verbose=False, **options)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def lpips_distance(network, before, after, batch_size=16):
    """Return LPIPS of each image pair of the same prompt and seed, (n,).

    Raises ValueError for unpaired images and as `check_images` does.
    """
    if check_images(before).shape != check_images(after).shape:
        raise ValueError(
            f"images before and after must be pairs of one size, got {tuple(before.shape)} and "
            f"{tuple(after.shape)}"
        )
    batches = zip(before.split(batch_size), after.split(batch_size), strict=True)
    hidden = len(before) < 100
    batches = tqdm(list(batches), "LPIPS", file=sys.stdout, disable=hidden)
    return torch.cat([network(a, b, normalize=True).flatten() for a, b in batches])
