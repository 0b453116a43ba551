"""Build the five image sets of a concept, generated or imported, without near-duplicates."""

import inspect
import json
import random
import sys
from collections import Counter
from dataclasses import asdict, dataclass
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
from mu.concepts.sets import read_captions
from mu.files import atomic, digest, read_json, save_json
from mu.hub import located
from mu.images import open_image
from mu.models import FAMILIES, check_lengths, encode_prompts, half, load_pipeline, select
from mu.params import open_run, protocol
from mu.sampling import draw_images, images_per_batch


@dataclass(frozen=True)
class BuildOptions:
    """How many images to build, how to generate them, and which are near-duplicates."""

    images_a_prompt: int = 8  # of each of the concept's prompts
    images_a_concept: int = 4  # of each other thing
    steps: int = 25  # of the sampler, unless the concept has its own
    guidance: float = 5.0  # the same
    seed: int = 0
    hash_size: int = 16  # see `find_duplicate`
    distance: int = 40


@dataclass(frozen=True)
class Job:
    """A prompt to draw: `count` images stem-0.png, stem-1.png, … from seed, seed + 1, …"""

    role: str
    thing: str
    text: str
    count: int
    stem: str
    seed: int


def load_generator(model):
    """Load any text-to-image pipeline of diffusers, in half precision on a GPU.

    Pipelines outside `FAMILIES` are offloaded to the CPU (FLUX.1 takes 34 GB). Safetensors only.
    Raises as `located` does.
    """
    gpu = PartialState().device.type == "cuda"
    with located(model) as path:
        if AutoPipelineForText2Image.load_config(path)["_class_name"] in FAMILIES:
            return load_pipeline(model, dtype="half" if gpu else "full")
        dtype = half(PartialState().device)
        pipe = AutoPipelineForText2Image.from_pretrained(path, dtype=dtype, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    if gpu:
        pipe.enable_model_cpu_offload()
    return pipe


@torch.no_grad()
def draw(pipe, prompt, seeds, size, steps, guidance):
    """Return PIL images of a prompt, one per seed.

    size: pixels, for pipelines outside `FAMILIES`; at least 512, below which they draw badly.
    """
    if isinstance(pipe, tuple(FAMILIES.values())):
        rows = torch.zeros(len(seeds), dtype=torch.long)
        conditioning = select(encode_prompts(pipe, [prompt]), rows)
        images = draw_images(pipe, conditioning, encode_prompts(pipe, [""]), seeds, guidance, steps)
        return pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(images))
    side = max(size, 512)
    options = dict(height=side, width=side, num_inference_steps=steps, guidance_scale=guidance)
    if "max_sequence_length" in inspect.signature(pipe.__call__).parameters:
        options["max_sequence_length"] = 256  # FLUX.1-schnell was trained with no more
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [pipe(prompt, generator=generator, **options).images[0] for generator in generators]


def save_image(image, path):
    """Save an image as PNG."""
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


def find_duplicate(image, name, hashes, options=BuildOptions()):
    """Return {"of": name, "distance": bits} if an image is a near-duplicate, else None.

    Adds a new image to `hashes`, a dict name → pHash of hash_size² bits. In data/pocket-sets (614
    emoji, 256 bits), re-saved, resized or 10 % brighter images differ in at most 32 bits, different
    drawings in at least 68, the same drawing at another place in 26 or more.
    """
    own = imagehash.phash(image, options.hash_size)
    distances = ((own - known, other) for other, known in hashes.items())
    bits, nearest = min(distances, default=(options.distance + 1, None))
    if bits <= options.distance:
        return {"of": nearest, "distance": int(bits)}
    hashes[name] = own
    return None


def read_imports(source):
    """Return (path, caption) of the images in a folder and below; caption None if there are none.

    Captions are read as `read_captions` does. Raises FileNotFoundError if there is no image,
    ValueError if some have captions and others have none, and as `read_captions` does.
    """
    kinds = Image.registered_extensions().items()
    endings = {ending for ending, kind in kinds if kind in Image.OPEN}
    files = sorted(file for file in Path(source).rglob("*") if file.suffix.lower() in endings)
    files = [file for file in files if not file.name.startswith(".")]  # ._a.png of macOS
    if not files:
        raise FileNotFoundError(f"no images in {source}: add .png, .jpg, .webp, … files")
    captions = read_captions(source, files)
    without = [file for file in files if file not in captions]
    if captions and without:
        raise ValueError(
            f"{source}: {len(without)} of {len(files)} images have no caption, such as "
            f"{without[0].name}: give each one, or remove the others' captions"
        )
    return [(file, captions.get(file)) for file in files]


def split_by_caption(found, needed, summary):
    """Split captioned images between the sides: two thirds to the defender, no caption on both."""
    texts = [caption.lower().strip() for _, caption in found]
    counts = Counter(texts)
    sides = {"forget": [], "attack": []}
    for text in sorted(counts, key=lambda text: (-counts[text], text)):
        side = "forget" if len(sides["forget"]) <= 2 * len(sides["attack"]) else "attack"
        sides[side] += [item for item, other in zip(found, texts, strict=True) if other == text]
    ours, theirs = map(len, sides.values())
    if min(ours, theirs) < needed:
        raise ValueError(
            f"{summary}: by caption {ours} go to the defender and {theirs} to the attacker, but "
            f"each needs {needed}; add images with other captions, or remove the captions"
        )
    return sides


def split_by_prompt(found, prompts, needed, summary):
    """Split images between the sides, `needed` for each of their prompts (role → prompts)."""
    counts = {role: needed * len(texts) for role, texts in prompts.items()}
    if len(found) < sum(counts.values()):
        raise ValueError(
            f"{summary}: the defender needs {counts['forget']}, the attacker {counts['attack']} "
            f"({needed} per prompt); add images, or lower images_a_prompt"
        )
    sides, rest = {}, iter(found)
    for role, texts in prompts.items():
        sides[role] = [(next(rest)[0], texts[i % len(texts)]) for i in range(counts[role])]
    return sides


def share_imports(source, concept, options, size, duplicate):
    """Return role → (path, prompt) of imported images, and the near-duplicates left out.

    Captions become prompts, each on one side. Raises ValueError if there are
    too few images, and as `read_imports` and `open_image` do.
    """
    found, removed = [], []
    for path, caption in tqdm(read_imports(source), "import", file=sys.stdout):
        near = duplicate(open_image(path, size), str(path))
        if near:
            removed.append({"file": str(path)} | near)
        else:
            found.append((path, caption))
    random.Random(options.seed).shuffle(found)
    summary = f"{source} holds {len(found)} images and {len(removed)} near-duplicates"
    if found[0][1]:
        return split_by_caption(found, options.images_a_prompt, summary), removed
    prompts = {role: concept.prompts[role][concept.name] for role in ("forget", "attack")}
    return split_by_prompt(found, prompts, options.images_a_prompt, summary), removed


def save_imports(folder, imported, concept, size):
    """Save imported images (role → (path, prompt)). Return role → lines of metadata."""
    lines = {role: [] for role in SIDES}
    for role, items in imported.items():
        for i, (path, text) in enumerate(items):
            name = f"{i:03d}-{slug(path.stem)}.png"
            save_image(open_image(path, size), folder / SIDES[role] / name)
            lines[role].append({"file_name": name, "text": text, "concept": concept.name})
    return lines


def plan_jobs(concept, options, roles):
    """Return the `Job`s of some roles. Seeds start at 100,000, above evaluation prompts' seeds."""
    jobs = []
    for role in roles:
        for thing, texts in concept.prompts[role].items():
            for i, text in enumerate(texts):
                count = len(range(i, options.images_a_concept, len(texts)))
                if role in ("forget", "attack"):
                    count = options.images_a_prompt
                stem = f"{SIDES[role]}/{len(jobs):03d}-{slug(thing)}"
                seed = 10**9 * options.seed + 10**5 * (len(jobs) + 1)
                jobs.append(Job(role, thing, text, count, stem, seed))
    return jobs


def run_job(folder, job, sample, duplicate, batch):
    """Draw a job's prompt until `count` images differ; others move to near-duplicates/.

    Existing files are not drawn again. sample: (text, seeds) → images. Returns the kept files and
    the near-duplicates. Raises ValueError if most images are near-duplicates.
    """
    duplicates, attempt, kept, removed = folder / "near-duplicates", 0, [], []
    while len(kept) < job.count:
        if attempt > 4 * job.count:
            raise ValueError(
                f"{job.text!r} gave {len(kept)} of {job.count} images in {attempt} attempts, the "
                f"rest are near-duplicates (see {duplicates}): build another folder with fewer "
                "images, more prompts, or a lower distance"
            )
        numbers = range(attempt, attempt + min(batch, job.count - len(kept)))
        files = {Path(f"{job.stem}-{i}.png"): job.seed + i for i in numbers}
        missing = [f for f in files if not (folder / f).exists() and not (duplicates / f).exists()]
        images = sample(job.text, [files[f] for f in missing]) if missing else []
        for file, image in zip(missing, images, strict=True):
            save_image(image, folder / file)
        for file in files:
            moved = (duplicates / file).exists()
            near = duplicate(Image.open((duplicates if moved else folder) / file), str(file))
            if near and not moved:
                (duplicates / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).rename(duplicates / file)
            if near:
                removed.append({"file": f"near-duplicates/{file}"} | near)
            else:
                kept.append(file)
        attempt += len(files)
    return kept, removed


def probe_groups(concept):
    """Return group → {prompt: label}: all prompts of the concept, the first of other things.

    Related styles have four, since they are shown on things.
    """
    style = concept.kind == "style"
    kind, first = ("style", 4) if style else ("concept", 1)
    labels = {"forget": (kind, None), "related": (kind, first), "unrelated": ("concept", 1)}
    groups = {}
    for role, (label, count) in labels.items():
        things = concept.prompts[role].items()
        groups[role] = {text: f"{label}:{x}" for x, texts in things for text in texts[:count]}
    return groups


def mark_harmful(folder):
    """Declare a concept harmful, unless concept.json records a build. Return a message."""
    file = Path(folder) / "concept.json"
    if not file.exists():
        save_json({"harmful": True}, file)
    if read_json(file).get("harmful"):
        return f"{file} declares the concept harmful: all notebooks blur its images"
    return f'only this notebook blurs the images: add "harmful": true to {file} for the others'


def make_sampler(concept, model, pipe, size, sampler):
    """Return a function (text, seeds) → images, which loads the generator on its first call."""

    @cache
    def generator():
        return pipe if concept.generator == model else load_generator(concept.generator)

    def sample(text, seeds):
        images = draw(generator(), text, seeds, size, **sampler)
        return [ImageOps.fit(image, (size, size), Image.LANCZOS) for image in images]

    return sample


def build(folder, concept, model="pocket", images="", options=BuildOptions()):
    """Write the five sets of a `Concept`, probe.json and concept.json (the record). Return folder.

    model: the model to unlearn; defines image size and known words. images: folder of your own
    images of the concept. An interrupted build continues. Raises ValueError for unknown words,
    long prompts and too few different images, and as `read_imports`, `open_run`, `located` do.
    """
    if min(options.images_a_prompt, options.images_a_concept) < 1:
        raise ValueError(f"images_a_prompt and images_a_concept must be at least 1, got {options}")
    folder, done = Path(folder), Path(folder) / "concept.json"
    pipe = load_pipeline(model, device=None if concept.generator == model else "cpu")
    check_words(pipe.tokenizer, concept.texts())
    check_lengths(pipe.tokenizer, concept.texts())
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    guidance = options.guidance if concept.guidance is None else concept.guidance
    sampler = {"steps": concept.steps or options.steps, "guidance": guidance}
    facts = asdict(concept) | {"size": size} | asdict(options) | sampler
    duplicate = partial(find_duplicate, hashes={}, options=options)
    imported, removed = {}, []
    if images and not done.exists():
        imported, removed = share_imports(images, concept, options, size, duplicate)
    open_run(folder, facts | {"images": digest(images) if images else ""})
    if done.exists():
        return folder
    lines = save_imports(folder, imported, concept, size)
    jobs = plan_jobs(concept, options, [role for role in SIDES if role not in imported])
    sample = make_sampler(concept, model, pipe, size, sampler)
    for job in tqdm(jobs, f"{concept.name}: prompts", file=sys.stdout):
        files, similar = run_job(folder, job, sample, duplicate, images_per_batch(pipe))
        removed += similar
        for file in files:
            line = {"file_name": file.name, "text": job.text, "concept": job.thing}
            lines[job.role].append(line)
    for role, place in SIDES.items():
        with atomic(folder / place / "metadata.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines[role]))
    save_json(probe_groups(concept), folder / "probe.json")
    found = {
        "images": {place: len(lines[role]) for role, place in SIDES.items()},
        "near_duplicates": removed,
        "imported_from": str(images),
        "date": str(date.today()),
    }
    save_json(protocol(**facts | found), done)
    return folder
