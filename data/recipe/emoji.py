"""The pocket data: captioned emoji, drawn from the SVG sets in npm's `@iconify-json/*` packages."""

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
from safetensors.torch import load_file

from mu.files import read_json, save_json, save_tensors

# style word in captions → (npm package, version): the pocket model learns these
STYLES = {
    "openmoji": ("@iconify-json/openmoji", "1.2.29"),
    "noto": ("@iconify-json/noto", "1.2.9"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
}
# only the judge and the attacker see these
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
# defender and attacker share no prompt: each has its own half of the templates
SIDES = {
    "defender": ("a {}", "a photo of a {}", "a drawing of a {}"),
    "attacker": ("a picture of a {}", "an emoji of a {}", "{}"),
}
TEMPLATES = SIDES["defender"] + SIDES["attacker"]
COUNTS = {"defender/forget": 24, "attacker/forget": 12, "attacker/clean": 24}  # images per set
UNSTYLED = ("defender/retain-unrelated", "attacker/clean")  # captions never name the style


def caption(concept, style=None, color=None, template="a {}"):
    """Return a caption of the pocket model's grammar: `a cat, noto style, on a blue background`."""
    text = template.format(concept)
    if style:
        text += f", {style} style"
    if color:
        text += f", on a {color} background"
    return text


def read_concepts(path):
    """Return the rows of `data/pocket-concepts.csv`: concept, group, kind, list of icons."""
    with open(path, newline="") as f:
        return [row | {"icons": row["icons"].split()} for row in csv.DictReader(f)]


def fetch(package, version, folder, file):
    """Return one JSON file of an npm package; `npm pack` fetches the package once into `folder`.

    Raises RuntimeError with npm's message if that fails.
    """
    tarball = Path(folder) / f"{package.strip('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        tarball.parent.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{package}@{version}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip()[-300:]
            raise RuntimeError(f"npm could not fetch {package}@{version}: {reason}")
    with tarfile.open(tarball) as tar:
        return json.load(tar.extractfile(f"package/{file}"))


def fetch_icons(package, version, folder):
    """Return icon name → SVG text of one npm package."""
    pack = fetch(package, version, folder, "icons.json")
    icons = dict(pack["icons"])
    for alias, target in pack.get("aliases", {}).items():
        icons[alias] = pack["icons"].get(target["parent"])
    svgs = {}
    for name, icon in icons.items():
        if icon:
            width, height = (icon.get(side, pack.get(side, 16)) for side in ("width", "height"))
            svgs[name] = (
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            )
    return svgs


def render(svg, size=128):
    """Render SVG text as a uint8 RGBA array (size, size, 4), centred if it is not square."""
    import resvg_py  # of the extra `recipe`

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    image = Image.new("RGBA", (size, size))
    image.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
    return np.asarray(image)


def draw_all(concepts, styles, folder):
    """Return {concept, style, icon, rgba} of every concept in every style that has it.

    folder: of the npm packages.
    """
    drawings = []
    for style, (package, version) in styles.items():
        icons = fetch_icons(package, version, folder)
        for row in concepts:
            facts = {"concept": row["concept"], "style": style}
            for name in row["icons"]:
                svg = icons.get(name) or icons.get(name.replace("-", ""))  # as fxemoji names it
                if svg:
                    drawings.append(facts | {"icon": name, "rgba": render(svg)})
    return drawings


def draw_once(folder, concepts, styles, packages):
    """Draw into drawings.json and drawings.safetensors of a folder, unless they exist.

    Returns the drawings as {concept, style, icon}, and their pixels, uint8 (n, 4, 128, 128).
    """
    file = folder / "drawings.safetensors"
    if not file.exists():
        drawn = draw_all(concepts, styles, packages)
        pixels = torch.from_numpy(np.stack([d.pop("rgba") for d in drawn])).permute(0, 3, 1, 2)
        save_json(drawn, folder / "drawings.json")
        save_tensors({"rgba": pixels}, file)
    return read_json(folder / "drawings.json"), load_file(file)["rgba"]


def augment(rgba, colors, generator, strength=1.0, size=64):
    """Apply random small affine maps and flips to drawings on plain backgrounds.

    rgba: uint8 (B, 4, 2·size, 2·size), averaged down at the end so that edges stay smooth; colors:
    (B, 3) in [0, 1]; strength 0 changes neither position nor scale. Returns float
    (B, 3, size, size) in [−1, 1].
    """
    b = len(rgba)

    def uniform(low, high):
        return low + (high - low) * torch.rand(b, generator=generator)

    angle = uniform(-0.2, 0.2) * strength
    scale = 1 + uniform(0.0, 0.35) * strength
    flip = torch.where(torch.rand(b, generator=generator) < 0.5 * min(strength, 1), -1.0, 1.0)
    shift_x, shift_y = (uniform(-0.12, 0.12) * strength for _ in range(2))
    row_x = torch.stack([flip * scale * angle.cos(), -scale * angle.sin(), shift_x], 1)
    row_y = torch.stack([flip * scale * angle.sin(), scale * angle.cos(), shift_y], 1)
    theta = torch.stack([row_x, row_y], 1)
    x = rgba.float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)  # premultiplied: resampling does not bleed
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    x = F.avg_pool2d(x, x.shape[-1] // size)
    return (x[:, :3] + (1 - x[:, 3:]) * colors[:, :, None, None]) * 2 - 1


def save_image(image, path):
    """Save one image (3, height, width) in [−1, 1] as PNG."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, optimize=True)


def write_set(folder, drawings, count, templates, generator, with_style=False, strength=0.5):
    """Write `count` augmented views as PNG with `metadata.jsonl`, the format of `imagefolder`.

    Cycles through the drawings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names, lines = list(COLORS), []
    for i in range(count):
        d, color = drawings[i % len(drawings)], 0
        if torch.rand((), generator=generator) < 0.5:
            color = int(torch.randint(len(names), (), generator=generator))
        rgba = torch.from_numpy(d["rgba"].copy()).permute(2, 0, 1)[None]
        background = torch.tensor([COLORS[names[color]]]) / 255
        file = f"{i:03d}-{d['concept'].replace(' ', '-')}-{d['style']}.png"
        save_image(augment(rgba, background, generator, strength)[0], folder / file)
        template = templates[int(torch.randint(len(templates), (), generator=generator))]
        style = d["style"] if with_style else None
        text = caption(d["concept"], style, names[color] if color else None, template)
        facts = {"concept": d["concept"], "style": d["style"]}
        lines.append(json.dumps({"file_name": file, "text": text} | facts) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def one_each(drawings):
    """Return the last drawing of each concept."""
    return list({d["concept"]: d for d in drawings}.values())


def choose_drawings(drawings, concept, kind, related, held_out):
    """Return name of set → drawings, for a concept to unlearn; see `write_attack_sets`."""
    ours = [d for d in drawings if d["style"] in STYLES]
    theirs = [d for d in drawings if d["style"] in ATTACKER_STYLES]
    if kind == "style":
        styled = [d for d in ours if d["style"] == concept]
        forget = [d for d in styled if d["concept"] not in held_out]
        attack = [d for d in styled if d["concept"] in held_out]
        near = [d for d in ours if d["style"] in related and d["concept"] not in held_out]
        far = one_each(near)
        near = near[:48]
    else:
        forget = [d for d in ours if d["concept"] == concept]
        attack = [d for d in theirs if d["concept"] == concept]
        near = [d for d in ours if d["concept"] in related]
        far = one_each([d for d in ours if d["concept"] not in {concept, *related} | held_out])
    return {
        "defender/forget": forget,
        "defender/retain-related": near,
        "defender/retain-unrelated": far,
        "attacker/forget": attack,
        "attacker/clean": one_each([d for d in theirs if d["concept"] in held_out]),
    }


def choose_prompts(concept, kind, related, retained, held_out):
    """Return the evaluation prompts of a concept: group → prompt → label that the judge should see.

    Unrelated prompts name concepts of the retain set and concepts that are held out.
    """
    away = sorted(held_out)[::2][:12]
    if kind == "style":
        forget = {caption(c, concept): f"style:{concept}" for c in away[:8]}
        near = {caption(c, style): f"style:{style}" for style in related for c in away[:4]}
    else:
        forget = {caption(concept): f"concept:{concept}"}
        near = {f"a {c}": f"concept:{c}" for c in related}
    far = {f"a {c}": f"concept:{c}" for c in retained[:12] + away}
    return {"forget": forget, "related": near, "unrelated": far}


def write_attack_sets(folder, drawings, concept, kind, related, seed=0):
    """Write the image sets of a concept to unlearn, and its evaluation prompts, probe.json.

    Sets: defender/{forget, retain-related, retain-unrelated}, attacker/{forget, clean}.
    An object or character is attacked with drawings in styles that the defender never sees. A
    style is attacked with other concepts than the defender's; related are then other styles,
    unrelated the captions without a style. One concept in four is held out of the retain sets, so
    that retention is also measured where nothing trained it.
    """
    g = torch.Generator().manual_seed(seed)
    shuffled = [drawings[i] for i in torch.randperm(len(drawings), generator=g).tolist()]
    held_out = set(sorted({d["concept"] for d in drawings})[3::4]) - {concept, *related}
    folder, sets = Path(folder), choose_drawings(shuffled, concept, kind, related, held_out)
    for name, chosen in sets.items():
        templates = SIDES[name.split("/")[0]]
        with_style = kind == "style" and name not in UNSTYLED
        count = COUNTS.get(name, len(chosen))
        write_set(folder / name, chosen, count, templates, g, with_style)
    retained = [d["concept"] for d in sets["defender/retain-unrelated"]]
    probe = choose_prompts(concept, kind, related, retained, held_out)
    (folder / "probe.json").write_text(json.dumps(probe, indent=1) + "\n")
