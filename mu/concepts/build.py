"""The images of a concept: drawn by a model or imported, without near-duplicates, in the five sets that the other notebooks read."""

import inspect
import json
import random
import sys
from dataclasses import asdict
from datetime import date
from functools import cache, partial
from pathlib import Path

import imagehash
import torch
from accelerate import PartialState
from diffusers import AutoPipelineForText2Image
from PIL import Image, ImageOps
from tqdm import tqdm

from mu.concepts.presets import SIDES, check_words, slug
from mu.concepts.sets import read_metadata
from mu.files import atomic, digest, read_json, save_json
from mu.models import FAMILIES, check_lengths, encode_prompts, half, load_pipeline, located, select
from mu.params import open_run, protocol
from mu.sampling import draw_images


def load_generator(model):
    """Any text-to-image pipeline of diffusers, ready to draw: in half precision on a GPU, and if it is none of the two families, parts of it there only while they are
    needed (FLUX.1 takes 34 GB). Safetensors only. Raises as `located` does."""
    gpu = PartialState().device.type == "cuda"
    with located(model) as path:
        if AutoPipelineForText2Image.load_config(path)["_class_name"] in FAMILIES:
            return load_pipeline(model, dtype="half" if gpu else "full")
        pipe = AutoPipelineForText2Image.from_pretrained(
            path, dtype=half(PartialState().device), use_safetensors=True
        )
    pipe.set_progress_bar_config(disable=True)
    if gpu:
        pipe.enable_model_cpu_offload()
    return pipe


@torch.no_grad()
def draw(pipe, prompt, seeds, size, steps, guidance):
    """PIL images of a prompt, one from each seed. size: in pixels, of a pipeline that has no size of its own; at least 512, since below that they draw badly."""
    if isinstance(pipe, tuple(FAMILIES.values())):
        conditioning = select(
            encode_prompts(pipe, [prompt]), torch.zeros(len(seeds), dtype=torch.long)
        )
        images = draw_images(pipe, conditioning, encode_prompts(pipe, [""]), seeds, guidance, steps)
        return pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(images))
    extra = (
        {"max_sequence_length": 256}
        if "max_sequence_length" in inspect.signature(pipe.__call__).parameters
        else {}
    )  # all that FLUX.1-schnell was trained with
    return [
        pipe(
            prompt,
            height=max(size, 512),
            width=max(size, 512),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed),
            **extra,
        ).images[0]
        for seed in seeds
    ]


def open_image(path, size):
    """An image file as a square: upright, transparency on white, the middle of it, size × size. Raises ValueError that names a file which is no image."""
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} is not a readable image ({error}): remove or replace it"
        ) from error
    white = Image.new("RGBA", image.size, "white")
    return ImageOps.fit(
        Image.alpha_composite(white, image).convert("RGB"), (size, size), Image.LANCZOS
    )


def twin(image, name, kept, hash_size=16, distance=40):
    """What an image is a near-duplicate of: {"of": name, "distance": bits that differ}. None if it is of none; then it joins `kept`, a dict name → hash.

    pHash of hash_size² bits, which of the lowest frequencies are above their median. In the 614 emoji of data/pocket-sets an image that is saved anew, resized or a tenth brighter is at
    most 32 of 256 bits away, two different drawings at least 68, one drawing placed twice 26 and more."""
    own = imagehash.phash(image, hash_size)
    away, nearest = min(
        ((own - other, other_name) for other_name, other in kept.items()),
        default=(distance + 1, None),
    )
    if away <= distance:
        return {"of": nearest, "distance": int(away)}
    kept[name] = own


def read_imports(source):
    """Paths and captions (None without metadata.jsonl) of a folder of somebody's images. Raises FileNotFoundError or ValueError where there is none."""
    source = Path(source)
    if (source / "metadata.jsonl").is_file():
        return [(source / line["file_name"], line["text"]) for line in read_metadata(source)]
    endings = {
        ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN
    }
    files = sorted(file for file in source.rglob("*") if file.suffix.lower() in endings)
    if not files:
        raise FileNotFoundError(
            f"{source} holds no image: put files there that end in .png, .jpg, .webp, …"
            if source.is_dir()
            else f"there is no folder {source} to import from"
        )
    return [(file, None) for file in files]


def share_imports(source, concept, images_a_prompt, size, seed, sieve):
    """Imported images for the two sides: role → (path, prompt); and what was left out as a near-duplicate.

    Captions of their own (metadata.jsonl) go to one side each, about two in three of the images to the defender; otherwise every side needs `images_a_prompt` for each
    of its prompts. Raises ValueError that says how many there are and how many are needed."""
    found, removed, order = [], [], random.Random(seed)
    for path, caption in tqdm(read_imports(source), "import", file=sys.stdout):
        if near := sieve(open_image(path, size), str(path)):
            removed.append({"file": str(path)} | near)
        else:
            found.append((path, caption))
    order.shuffle(found)
    there = f"{source} holds {len(found)} images, {len(removed)} more are near-duplicates of these"
    if found[0][
        1
    ]:  # whole captions, the most frequent first, to the side that has too little of its share
        sides, texts = (
            {"forget": [], "attack": []},
            [caption.lower().strip() for _, caption in found],
        )
        for text in sorted(set(texts), key=lambda text: (-texts.count(text), text)):
            side = "forget" if len(sides["forget"]) <= 2 * len(sides["attack"]) else "attack"
            sides[side] += [
                item for item, other in zip(found, texts, strict=False) if other == text
            ]
        if min(map(len, sides.values())) < images_a_prompt:
            raise ValueError(
                f"{there}; with their captions {len(sides['forget'])} go to the defender, {len(sides['attack'])} to the attacker, and each needs "
                f"{images_a_prompt}: add images with other captions, or remove metadata.jsonl, and the concept's prompts are the captions"
            )
        return sides, removed
    prompts = {role: concept.prompts[role][concept.name] for role in ("forget", "attack")}
    ours, theirs = (images_a_prompt * len(texts) for texts in prompts.values())
    if len(found) < ours + theirs:
        raise ValueError(
            f"{there}; needed are {ours} for the defender and {theirs} for the attacker, {images_a_prompt} for each of {sum(map(len, prompts.values()))} prompts: "
            "add images, or ask for fewer a prompt"
        )

    def deal(part, texts):
        return [(path, texts[i % len(texts)]) for i, (path, _) in enumerate(part)]

    return {
        "forget": deal(found[:ours], prompts["forget"]),
        "attack": deal(found[ours : ours + theirs], prompts["attack"]),
    }, removed


def save_image(image, path):
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


def fill_prompt(folder, stem, text, count, artist, sieve, *, seed, size, batch, how):
    """Draw a prompt until `count` images of it are near-duplicates of none: stem-0.png from `seed`, stem-1.png from seed + 1, and so on; those that are left out go
    below near-duplicates/. What is there already, of either kind, is not drawn again. artist: a function that returns the pipeline, once it is needed.

    Yields what to say of each: (file, None), or (file, what it is a near-duplicate of). Raises ValueError where most of them are."""
    attempt, found = 0, 0
    while found < count:
        if attempt > 4 * count:
            raise ValueError(
                f"{text!r} gave {found} of {count} images in {attempt} attempts, the others are near-duplicates and lie below {folder / 'near-duplicates'}: "
                "ask for fewer images, name more prompts, or lower the distance; in another folder"
            )
        files = {
            Path(f"{stem}-{i}.png"): seed + i
            for i in range(attempt, attempt + min(batch, count - found))
        }
        missing = [
            file
            for file in files
            if not (folder / file).exists() and not (folder / "near-duplicates" / file).exists()
        ]
        for file, image in zip(
            missing,
            draw(artist(), text, [files[file] for file in missing], size, **how) if missing else (),
            strict=False,
        ):
            save_image(ImageOps.fit(image, (size, size), Image.LANCZOS), folder / file)
        for file in files:
            spare = folder / "near-duplicates" / file
            near = sieve(Image.open(spare if spare.exists() else folder / file), str(file))
            if near and not spare.exists():
                spare.parent.mkdir(parents=True, exist_ok=True)
                (folder / file).rename(spare)
            found += not near
            yield file, near
        attempt += len(files)


def read_probe(concept):
    """What is judged: all of the concept's own prompts, the first of every other thing; of a related style the first four, since it is shown on things."""
    kind, first = ("style", 4) if concept.kind == "style" else ("concept", 1)
    labels = {"forget": (kind, None), "related": (kind, first), "unrelated": ("concept", 1)}
    return {
        role: {
            text: f"{label}:{thing}"
            for thing, texts in concept.prompts[role].items()
            for text in texts[:most]
        }
        for role, (label, most) in labels.items()
    }


def mark_harmful(folder):
    """Let a folder of sets say that its concept is harmful, so that whoever reads it (`mu.concepts.sets.is_harmful`) blurs its pictures: a concept.json is written where there is none.

    Returns what to tell people; one that says something else is not changed, since it is the record of how the folder was made."""
    file = Path(folder) / "concept.json"
    if not file.exists():
        save_json({"harmful": True}, file)
        return f"{file} now says that this concept is harmful: the other notebooks blur its pictures, too"
    if read_json(file).get("harmful"):
        return (
            f"{file} says that this concept is harmful: the other notebooks blur its pictures, too"
        )
    return f'{file} does not say that this concept is harmful: it is blurred here, and NOT in the other notebooks; put "harmful": true there'


def build(
    folder,
    concept,
    model="pocket",
    *,
    images="",
    images_a_prompt=8,
    images_a_concept=4,
    steps=25,
    guidance=5.0,
    seed=0,
    hash_size=16,
    distance=40,
):
    """Write the five sets of a `Concept`, its probe.json, and concept.json: what it is, what was asked for, what was left out. Returns the folder.

    model: the one to be worked on, whose size the images get and whose words the prompts must be. images: a folder of somebody's own for the concept itself (both
    sides); all else is drawn, `images_a_prompt` for each of the concept's prompts, `images_a_concept` for each other thing. Each image has a seed of its own, from 100,000,
    where no probe's are; one that is there already is not drawn again, and for a near-duplicate (`twin`) another one is drawn.
    Raises ValueError for unknown words, for prompts that are too long, and where too few different images are left; and as `read_imports`, `open_run`, `located` do."""
    if images_a_prompt < 1 or images_a_concept < 1:
        raise ValueError(
            f"images_a_prompt and images_a_concept must be at least 1, got {images_a_prompt} and {images_a_concept}"
        )
    folder, pipe = (
        Path(folder),
        load_pipeline(model, device=None if concept.generator == model else "cpu"),
    )
    texts, size = (
        [text for things in concept.prompts.values() for some in things.values() for text in some],
        pipe.unet.config.sample_size * pipe.vae_scale_factor,
    )
    check_words(pipe.tokenizer, texts)
    check_lengths(pipe.tokenizer, texts)
    how = {
        "steps": concept.steps or steps,
        "guidance": guidance if concept.guidance is None else concept.guidance,
    }
    facts = (
        asdict(concept)
        | how
        | dict(
            size=size,
            images_a_prompt=images_a_prompt,
            images_a_concept=images_a_concept,
            seed=seed,
            hash_size=hash_size,
            distance=distance,
        )
    )
    done, kept = folder / "concept.json", {}
    sieve = partial(twin, kept=kept, hash_size=hash_size, distance=distance)
    imported, removed = (
        share_imports(images, concept, images_a_prompt, size, seed, sieve)
        if images and not done.exists()
        else ({}, [])
    )
    open_run(folder, facts | {"images": digest(images) if images else ""})
    if done.exists():
        return folder
    lines = {role: [] for role in SIDES}
    for role, items in imported.items():
        for i, (path, text) in enumerate(items):
            name = f"{i:03d}-{slug(path.stem)}.png"
            save_image(open_image(path, size), folder / SIDES[role] / name)
            lines[role].append({"file_name": name, "text": text, "concept": concept.name})
    plan = [
        (
            role,
            thing,
            text,
            images_a_prompt
            if role in ("forget", "attack")
            else len(range(i, images_a_concept, len(some))),
        )
        for role in SIDES
        if role not in imported
        for thing, some in concept.prompts[role].items()
        for i, text in enumerate(some)
    ]
    artist = cache(
        lambda: pipe if concept.generator == model else load_generator(concept.generator)
    )
    with tqdm(
        total=sum(count for *_, count in plan), desc=concept.name, file=sys.stdout
    ) as progress:
        for index, (role, thing, text, count) in enumerate(plan):
            stem, batch = (
                f"{SIDES[role]}/{index:03d}-{slug(thing)}",
                max(1, 64 * 16**2 // pipe.unet.config.sample_size**2),
            )
            for file, near in fill_prompt(
                folder,
                stem,
                text,
                count,
                artist,
                sieve,
                seed=10**9 * seed + 10**5 * (index + 1),
                size=size,
                batch=batch,
                how=how,
            ):
                if near:
                    removed.append({"file": f"near-duplicates/{file}"} | near)
                else:
                    lines[role].append({"file_name": file.name, "text": text, "concept": thing})
                    progress.update()
    for role, place in SIDES.items():
        with atomic(folder / place / "metadata.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines[role]))
    save_json(read_probe(concept), folder / "probe.json")
    found = {
        "images": {SIDES[role]: len(x) for role, x in lines.items()},
        "near_duplicates": removed,
        "imported_from": str(images),
        "date": str(date.today()),
    }
    save_json(protocol(**facts | found), done)
    return folder
