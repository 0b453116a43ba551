"""How far two sets of pictures, or two pictures, lie apart: FID, its like in the judge's features, LPIPS. Each distance comes with the facts for its card.

Images are tensors (n, 3, height, width) in 0…1, or folders of PNG and JPEG files. Nothing is downloaded but by the library that owns the weights."""

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

LEAST = 64  # images below which a Fréchet distance is refused: with so few it says how many there are, not how they look


def picture_files(folder):
    """The PNG and JPEG files of a folder, sorted. Raises FileNotFoundError for no folder or none in it, ValueError that names the first which cannot be read."""
    files = sorted(
        f
        for f in Path(folder).glob("*")
        if f.suffix.lower() in (".png", ".jpg", ".jpeg") and not f.name.startswith(".")
    )
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no pictures: a folder with PNG or JPEG files is needed, right in it"
        )
    for file in files:
        try:
            with Image.open(file) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"{file} is not a readable picture ({error}): remove it, or make it again"
            ) from error
    return files


def finite(images, what="images"):
    """The images, checked. Raises ValueError for NaN, for another shape, and for values far outside 0…1."""
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(
            f"{what} have the shape (n, 3, height, width) with n from 1, got {tuple(images.shape)}"
        )
    if not torch.isfinite(images).all():
        raise ValueError(
            f"{what} hold NaN or infinite values: the model that drew them has diverged"
        )
    if images.min() < -1e-3 or images.max() > 1 + 1e-3:
        raise ValueError(f"{what} lie in 0…1, these in {images.min():g}…{images.max():g}")
    return images


def frechet(a, b):
    """‖μ_a − μ_b‖² + tr(S_a + S_b − 2 (S_a S_b)^½) of features (n, width): the squared Fréchet distance of two normal distributions with their means and covariances
    (unbiased). The trace of the root is the sum of the roots of the product's eigenvalues."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    root = np.sqrt(eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root)


def enough(name, counts, width, least):
    """The mark for a Fréchet distance of few images: "" or words. Raises ValueError below `least`."""
    if min(counts) < least:
        raise ValueError(
            f"{name} of {min(counts)} images says nothing: at least {least} of each side are needed (better {width + 1}, the rank of its covariance)"
        )
    return (
        ""
        if min(counts) > width
        else f"few images: biased upwards, compare only with {name} of as many (rank of the covariance needs {width + 1})"
    )


def ready_for_fid(images, reference, least=LEAST):
    """What `fid` needs, asked for before anything is drawn: (number of pictures of each side, the mark for few, torch-fidelity). A side is a folder, or the number of pictures that will be
    in it. Raises as `fid` does."""
    counts = [
        side if isinstance(side, int) else len(picture_files(side)) for side in (images, reference)
    ]
    return counts, enough("FID", counts, 2048, least), extra("torch_fidelity", "torch-fidelity")


def fid(images, reference, size, weights=None, batch_size=32, least=LEAST):
    """FID (Heusel et al. 2017) of two folders by torch-fidelity: ({"fid"}, facts for the card, among them `marked` where the images are few).

    size: side to which all pictures are brought (resized by their shorter side, then cropped), so that a reference of many sizes is compared at the model's.
    weights: file of torch-fidelity's Inception, where it cannot be downloaded. Raises as `picture_files` does, ImportError without the package, ValueError for few images."""
    counts, marked, fidelity = ready_for_fid(images, reference, least)
    with contextlib.redirect_stderr(sys.stdout):  # its progress bars
        found = fidelity.calculate_metrics(
            input1=str(images),
            input2=str(reference),
            fid=True,
            cuda=torch.cuda.is_available(),
            batch_size=batch_size,
            cache=False,
            verbose=True,
            samples_resize_and_crop=size,
            feature_extractor_weights_path=weights,
        )["frechet_inception_distance"]
    return {"fid": found}, {
        "fid_backend": f"torch-fidelity {version('torch-fidelity')}, {'its own weights' if weights is None else digest(weights)}",
        "fid_size": size,
        "fid_images": counts[0],
        "fid_reference": f"{counts[1]} images ({digest(reference)})",
        "fid_marked": marked,
    }


@torch.no_grad()
def judge_features(judge, images, batch_size=128):
    """What the pocket judge sees before it names anything: pooled features (n, width). Raises as `finite` does, TypeError for another judge."""
    if not hasattr(judge, "resnet"):
        raise TypeError(
            f"{type(judge).__name__} has no features to compare: JFD and change are of the pocket judge; leave `judge` empty here, and name `clip` or `nudenet`"
        )
    pixels = (
        F.interpolate(finite(images).float(), size=(64, 64), mode="area")
        if images.shape[-1] != 64
        else images.float()
    )
    return torch.cat(
        [judge.resnet(x * 2 - 1).pooler_output.flatten(1) for x in pixels.split(batch_size)]
    )


def judge_distance(a, b, least=LEAST):
    """JFD, judge-feature distance: `frechet` of `judge_features`. It is to the pocket models what FID is to large ones, is on another scale, and is no FID.

    Returns ({"jfd"}, facts). Raises ValueError for few images."""
    marked = enough("JFD", (len(a), len(b)), a.shape[1], least)
    return {"jfd": max(0.0, frechet(a, b))}, {
        "jfd_images": f"{len(a)} and {len(b)}, {a.shape[1]} features",
        "jfd_marked": marked,
    }


def judge_change(before, after):
    """1 − cosine of the judge's features of each pair of pictures (n,), drawn before and after from the same prompt and seed: 0 where nothing changed. It plays LPIPS' part for pocket models.

    before, after: `judge_features`. Raises ValueError where they are not pairs."""
    if before.shape != after.shape:
        raise ValueError(
            f"pictures before and after come in pairs of one prompt and seed, got {len(before)} and {len(after)}"
        )
    return 1 - F.cosine_similarity(before, after, dim=1)


def lpips_network(net="alex", **options):
    """The network of LPIPS (Zhang et al. 2018). Its trunk is torchvision's, fetched on first use. Raises ImportError without the package."""
    return (
        extra("lpips", "lpips")
        .LPIPS(net=net, verbose=False, **options)
        .eval()
        .requires_grad_(False)
    )


@torch.no_grad()
def lpips_distance(network, before, after, batch_size=16):
    """LPIPS of each pair of pictures (n,), drawn before and after from the same prompt and seed. Raises ValueError where they are not pairs of one size, and as `finite` does."""
    if finite(before).shape != finite(after).shape:
        raise ValueError(
            f"pictures before and after come in pairs of one size, got {tuple(before.shape)} and {tuple(after.shape)}"
        )
    pairs = tqdm(
        list(zip(before.split(batch_size), after.split(batch_size), strict=False)),
        "LPIPS",
        file=sys.stdout,
        disable=len(before) < 100,
    )
    return torch.cat([network(a, b, normalize=True).flatten() for a, b in pairs])
