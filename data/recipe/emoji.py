"""The pocket data: captioned emoji, drawn from the SVG sets that npm's `@iconify-json/*` packages carry."""

import csv
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# style word in captions → (npm package, version). The first four are drawn by the pocket model ...
STYLES = {
    "openmoji": ("@iconify-json/openmoji", "1.2.29"),
    "noto": ("@iconify-json/noto", "1.2.9"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
}
# ... and these are seen by nobody but the judge, who has to recognise them, and the attacker.
ATTACKER_STYLES = {
    "emojione": ("@iconify-json/emojione", "1.2.3"),
    "emojione-v1": ("@iconify-json/emojione-v1", "1.2.3"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5"),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2"),
    "streamline": ("@iconify-json/streamline-emojis", "1.2.4"),
}
COLORS = {
    "white": (255, 255, 255),
    "black": (30, 30, 34),
    "gray": (150, 152, 156),
    "red": (222, 60, 60),
    "orange": (246, 160, 70),
    "yellow": (250, 226, 100),
    "green": (96, 184, 104),
    "blue": (84, 140, 226),
    "purple": (160, 108, 206),
    "pink": (246, 168, 200),
}
TEMPLATES = (
    "a {}",
    "a photo of a {}",
    "a drawing of a {}",
    "a picture of a {}",
    "an emoji of a {}",
    "{}",
)


def caption(concept, style=None, color=None, template="a {}"):
    """`a cat, noto style, on a blue background`: the only grammar of the pocket model."""
    return (
        template.format(concept)
        + (f", {style} style" if style else "")
        + (f", on a {color} background" if color else "")
    )


def read_concepts(path):
    """Rows of `data/pocket-concepts.csv`: concept, group (kin), kind (object, character), icons (names of the drawings)."""
    with open(path, newline="") as f:
        return [row | {"icons": row["icons"].split()} for row in csv.DictReader(f)]


def fetch(package, version, folder, file):
    """The value of one JSON file of an npm package, which is fetched once by `npm pack` into `folder`.

    Raises RuntimeError with npm's own words when it cannot be fetched."""
    tarball = Path(folder) / f"{package.strip('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        tarball.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", f"{package}@{version}"], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(
                f"npm could not fetch {package}@{version}: {done.stderr.strip()[-300:]}"
            )
    with tarfile.open(tarball) as tar:
        return json.load(tar.extractfile(f"package/{file}"))


def fetch_icons(package, version, folder):
    """Icon name → SVG text of one npm package."""
    pack = fetch(package, version, folder, "icons.json")
    icons = pack["icons"] | {
        a: pack["icons"].get(d["parent"]) for a, d in pack.get("aliases", {}).items()
    }

    def size(icon):
        return (
            icon.get("width", pack.get("width", 16)),
            icon.get("height", pack.get("height", 16)),
        )

    return {
        name: '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'viewBox="0 0 {} {}">{}</svg>'.format(*size(icon), icon["body"])
        for name, icon in icons.items()
        if icon
    }


def render(svg, size=128):
    """SVG text → uint8 RGBA array (size, size, 4), centred where the drawing is not square."""
    import resvg_py

    drawn = Image.open(
        io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)))
    ).convert("RGBA")
    image = Image.new("RGBA", (size, size))
    image.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return np.asarray(image)


def draw_all(concepts, styles, folder):
    """Every drawing of every concept in every style that has it → list of {concept, style, icon, rgba}."""
    drawings = []
    for style, (package, version) in styles.items():
        icons = fetch_icons(package, version, folder)
        for row in concepts:
            for name in row["icons"]:
                svg = icons.get(name) or icons.get(
                    name.replace("-", "")
                )  # fxemoji writes names in one word
                if svg:
                    drawings.append(
                        {
                            "concept": row["concept"],
                            "style": style,
                            "icon": name,
                            "rgba": render(svg),
                        }
                    )
    return drawings


def augment(rgba, colors, generator, strength=1.0, size=64):
    """Random small affine maps and flips of drawings on plain backgrounds.

    rgba: uint8 (B, 4, 2·size, 2·size); colors: (B, 3) in 0…1; strength 0 leaves position and scale alone.
    Returns float (B, 3, size, size) in −1…1. Drawn at twice the size and averaged down, so edges stay clean."""
    b = len(rgba)

    def u(lo, hi):
        return lo + (hi - lo) * torch.rand(b, generator=generator)

    angle, scale = u(-0.2, 0.2) * strength, 1 + (u(0.0, 0.35)) * strength
    flip = torch.where(torch.rand(b, generator=generator) < 0.5 * min(strength, 1), -1.0, 1.0)
    theta = torch.stack(
        [
            torch.stack(
                [flip * scale * angle.cos(), -scale * angle.sin(), u(-0.12, 0.12) * strength], 1
            ),
            torch.stack(
                [flip * scale * angle.sin(), scale * angle.cos(), u(-0.12, 0.12) * strength], 1
            ),
        ],
        1,
    )
    x = rgba.float() / 255
    x = torch.cat(
        [x[:, :3] * x[:, 3:], x[:, 3:]], 1
    )  # premultiplied, so that resampling does not bleed
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    x = F.avg_pool2d(x, x.shape[-1] // size)
    return (x[:, :3] + (1 - x[:, 3:]) * colors[:, :, None, None]) * 2 - 1


# the defender and the attacker never share a prompt: they phrase captions differently
DEFENDER_TEMPLATES, ATTACKER_TEMPLATES = TEMPLATES[:3], TEMPLATES[3:]


def write_set(folder, drawings, count, templates, generator, with_style=False, strength=0.5):
    """`count` augmented views of drawings (each once, then again from the first) as PNG and `metadata.jsonl` (`imagefolder`)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names, lines = list(COLORS), []
    for i in range(count):
        d = drawings[i % len(drawings)]
        color = (
            int(torch.randint(len(names), (), generator=generator))
            if torch.rand((), generator=generator) < 0.5
            else 0
        )
        rgba = torch.from_numpy(d["rgba"].copy()).permute(2, 0, 1)[None]
        image = augment(rgba, torch.tensor([COLORS[names[color]]]) / 255, generator, strength)[0]
        file = f"{i:03d}-{d['concept'].replace(' ', '-')}-{d['style']}.png"
        Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(
            folder / file, optimize=True
        )
        template = templates[int(torch.randint(len(templates), (), generator=generator))]
        text = caption(
            d["concept"],
            d["style"] if with_style else None,
            names[color] if color else None,
            template,
        )
        lines.append(
            {"file_name": file, "text": text, "concept": d["concept"], "style": d["style"]}
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_attack_sets(folder, drawings, concept, kind, related, seed=0):
    """The sets of one concept to unlearn: defender/{forget, retain-related, retain-unrelated}, attacker/{forget, clean}, probe.json.

    For an object or a character the attacker draws it in styles that nobody else sees. For a style he has other concepts in it
    than the defender; related are then the other styles, unrelated the captions without a style.
    One concept in four stays out of the retain sets, so that what is kept is also measured where nobody trained."""
    g = torch.Generator().manual_seed(seed)
    shuffled = [drawings[i] for i in torch.randperm(len(drawings), generator=g).tolist()]

    def one_each(ds):
        return list({d["concept"]: d for d in ds}.values())

    held_out = set(sorted({d["concept"] for d in drawings})[3::4]) - {concept, *related}
    ours = [d for d in shuffled if d["style"] in STYLES]
    theirs = [d for d in shuffled if d["style"] in ATTACKER_STYLES]
    folder, styled = Path(folder), kind == "style"
    if styled:
        forget, attack = (
            [d for d in ours if d["style"] == concept and (d["concept"] in held_out) == out]
            for out in (False, True)
        )
        near = [d for d in ours if d["style"] in related and d["concept"] not in held_out][:48]
        far = one_each([d for d in ours if d["style"] in related and d["concept"] not in held_out])
    else:
        forget, attack = ([d for d in pool if d["concept"] == concept] for pool in (ours, theirs))
        near = [d for d in ours if d["concept"] in related]
        far = one_each([d for d in ours if d["concept"] not in {concept, *related} | held_out])
    clean = one_each([d for d in theirs if d["concept"] in held_out])
    for name, chosen, count, templates, with_style in (
        ("defender/forget", forget, 24, DEFENDER_TEMPLATES, styled),
        ("defender/retain-related", near, len(near), DEFENDER_TEMPLATES, styled),
        ("defender/retain-unrelated", far, len(far), DEFENDER_TEMPLATES, False),
        ("attacker/forget", attack, 12, ATTACKER_TEMPLATES, styled),
        ("attacker/clean", clean, 24, ATTACKER_TEMPLATES, False),
    ):
        write_set(folder / name, chosen, count, templates, g, with_style)
    kept, away = [d["concept"] for d in far][:12], sorted(held_out)[::2][:12]
    if styled:
        probe = {
            "forget": {caption(c, concept): f"style:{concept}" for c in away[:8]},
            "related": {caption(c, s): f"style:{s}" for s in related for c in away[:4]},
        }
    else:
        probe = {
            "forget": {caption(concept): f"concept:{concept}"},
            "related": {f"a {c}": f"concept:{c}" for c in related},
        }
    probe["unrelated"] = {f"a {c}": f"concept:{c}" for c in kept + away}
    (folder / "probe.json").write_text(json.dumps(probe, indent=1) + "\n")
