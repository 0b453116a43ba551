"""Attacks that change no weight: a few words of the text encoder's own vocabulary that make an unlearned model draw its concept.

What they share: `words`, of which a prompt can be made that is read as it was meant, and `stand_in`, which lets the text encoder(s) read other vectors in the place of
some words, with gradient. (One learned vector for a word, concept inversion, is trained: `mu.attacks.finetune.learned_word`.)"""

import time
from dataclasses import dataclass

import torch

from mu.attacks.tokens import embeddings, stand_in, swapped, words
from mu.meta import descend
from mu.models import encode_prompts, select
from mu.objectives import draw_minibatch, gradients, predictions, squared_errors


@dataclass(frozen=True)
class Sought:
    step: int  # steps done, this one included
    loss: float  # of the prompt below, on this step's noise; nan where the attack has none
    prompt: str  # as it stands: at the step's start by gradient, the best so far by the genetic algorithm
    passes: int  # forward passes of the UNet
    seconds: float


def opposed(captions, name, others):
    """Pairs (caption, the caption with another thing in the place of `name`, the `others` in turn) for `ring_a_bell`. Raises ValueError for a caption without the name."""
    pairs = [
        (caption, swapped(caption, name, others[i % len(others)]))
        for i, caption in enumerate(captions)
    ]
    for caption, other in pairs:
        if caption == other:
            raise ValueError(
                f"{caption!r} does not hold the word {name!r}, so that it shows no way to the concept: say what the captions call it (called)"
            )
    return pairs


def _simplex(u):
    """The nearest point to each row that is a probability: non-negative, with sum 1 (Duchi et al. 2008)."""
    ordered = u.sort(descending=True).values
    excess = (ordered.cumsum(-1) - 1) / torch.arange(1, u.shape[-1] + 1, device=u.device)
    last = (ordered > excess).sum(-1, keepdim=True) - 1
    return (u - excess.gather(-1, last)).clamp(min=0)


def _known(pipe, prompt, without, count):
    """The words that may be chosen, and `count` of them, none of the prompt's, that only mark the places in the text."""
    known = words(pipe, without)
    places = [word for word in known if word not in prompt.lower().replace(",", " ").split()][
        :count
    ]
    if len(places) < count:
        raise ValueError(
            f"{count} words before {prompt!r}: the vocabulary has only {len(known)} whole words that may be used; ask for fewer"
        )
    return known, places


def _before(chosen, prompt):
    return " ".join([*chosen, prompt])


def _one_hot(pipe, known, start, lr):
    """UnlearnDiffAtk's variables: (read, update). One row a place on the simplex over the words, moved by signed gradients; its likeliest word is read."""
    tables = embeddings(pipe, known)
    u = (
        torch.nn.functional.one_hot(start, len(known))
        .float()
        .to(tables[0].device)
        .requires_grad_(True)
    )

    def read():
        index = u.argmax(-1)
        hard = torch.nn.functional.one_hot(index, len(known)).float()
        return [u], index, [(hard + u - u.detach()).to(table) @ table for table in tables]

    def update(gradient):
        u.data = _simplex(u.data - lr * gradient[0].sign())

    return read, update


def _free(pipe, known, start, lr):
    """P4D's variables: (read, update). One free vector a place, moved by AdamW; the nearest word's vector (cosine) is read."""
    tables = embeddings(pipe, known)
    vectors = [table[start.to(table.device)].clone().requires_grad_(True) for table in tables]
    optimizer, unit = (
        torch.optim.AdamW(vectors, lr=lr, weight_decay=0.1),
        torch.nn.functional.normalize,
    )

    def read():
        index = sum(
            unit(v.detach()) @ unit(table).T for v, table in zip(vectors, tables, strict=False)
        ).argmax(-1)
        return (
            vectors,
            index,
            [table[index] + v - v.detach() for v, table in zip(vectors, tables, strict=False)],
        )

    return read, lambda gradient: descend(vectors, gradient, optimizer)


def _descend(
    pipe,
    concept_set,
    prompt,
    variables,
    target,
    count,
    steps,
    lr,
    batch_size,
    without,
    seed,
    loss_scale,
):
    """Search words before a prompt by the gradient of E ‖target − ε_θ(z_t, t, c(words, prompt))‖², straight through the choice of words."""
    known, places = _known(pipe, prompt, without, count)
    g, text = torch.Generator().manual_seed(seed), _before(places, prompt)
    read, update = variables(pipe, known, torch.randint(len(known), (count,), generator=g), lr)
    for step in range(1, steps + 1):
        began = time.perf_counter()
        parameters, index, vectors = read()
        with stand_in(pipe, places, vectors):
            conditioning = select(
                encode_prompts(pipe, [text]), torch.zeros(batch_size, dtype=torch.long)
            )
        batch = draw_minibatch(concept_set, pipe.scheduler, batch_size, g)
        wanted, passes = target(batch)
        loss = squared_errors(
            pipe.unet, (batch.noisy_latents, batch.timesteps, conditioning, wanted)
        )[0]
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"not finite: the loss of the prompt is {loss.item()} at step {step}; the model has diverged, or a lower lr than {lr:g} is needed"
            )
        update(gradients(loss, parameters, loss_scale))
        yield Sought(
            step,
            loss.item(),
            _before([known[i] for i in index.tolist()], prompt),
            1 + passes,
            time.perf_counter() - began,
        )


def unlearn_diff_atk(
    pipe,
    concept_set,
    prompt,
    *,
    count=3,
    steps=40,
    lr=0.1,
    batch_size=8,
    without=(),
    seed=0,
    loss_scale=1.0,
):
    """UnlearnDiffAtk (Zhang et al. 2024): words before a prompt with which the unlearned model denoises the concept's images. Yields `Sought`.

    min over words w of E ‖ε − ε_θ(z_t, t, c(w, prompt))‖² (mean over elements, t over all timesteps, z_0 from concept_set); signed gradient steps of `lr` on the simplex over the
    vocabulary, projected back; straight through the likeliest word. It needs images of the concept and no other model. count: words; without: texts whose words
    may not be used (those of the prompt may); loss_scale: of `mu.objectives.gradients`. The pipeline is left as it is. Raises ValueError where the vocabulary is too small,
    FloatingPointError for a loss that is not finite."""
    yield from _descend(
        pipe,
        concept_set,
        prompt,
        _one_hot,
        lambda batch: (batch.noise, 0),
        count,
        steps,
        lr,
        batch_size,
        without,
        seed,
        loss_scale,
    )


def p4d(
    pipe,
    original,
    concept_set,
    prompt,
    *,
    count=3,
    steps=40,
    lr=0.1,
    batch_size=8,
    without=(),
    seed=0,
    loss_scale=1.0,
):
    """P4D (Chin et al. 2024): words before a prompt with which the unlearned model predicts what the original one predicts for the prompt alone. Yields `Sought`.

    min over words w of E ‖ε_0(z_t, t, c(prompt)) − ε_θ(z_t, t, c(w, prompt))‖²; AdamW steps of `lr` on free vectors, straight through the nearest words' vectors.
    original: ε_0, the UNet before unlearning. The rest is as in `unlearn_diff_atk`."""
    plain = select(encode_prompts(pipe, [prompt]), torch.zeros(batch_size, dtype=torch.long))

    def target(batch):
        return (
            *predictions(original, (batch.noisy_latents, batch.timesteps, plain)),
            1,
        )

    yield from _descend(
        pipe,
        concept_set,
        prompt,
        _free,
        target,
        count,
        steps,
        lr,
        batch_size,
        without,
        seed,
        loss_scale,
    )


@torch.no_grad()
def ring_a_bell(
    pipe,
    prompt,
    pairs,
    *,
    strength=3.0,
    count=8,
    steps=100,
    population=64,
    mutation=0.25,
    without=(),
    seed=0,
):
    """Words whose text encoding is that of the prompt moved towards the concept (Ring-A-Bell, Tsai et al. 2024). Yields `Sought`, one a generation.

    min over words of ‖f(words) − f(prompt) − strength · mean_i [f(with_i) − f(without_i)]‖² (mean over elements), f: the states of the text encoder(s), by a genetic
    algorithm: the better half stays, children take each word from one of two parents, and a share `mutation` of them one random word. pairs: (text with
    the concept, the same text without). No UNet and no image is needed, so one result serves all models with this text encoder."""
    known, _ = _known(pipe, prompt, without, count)
    g, states = (
        torch.Generator().manual_seed(seed),
        lambda texts: encode_prompts(pipe, texts)["encoder_hidden_states"].float(),
    )
    target = states([prompt]) + strength * (
        states([a for a, _ in pairs]) - states([b for _, b in pairs])
    ).mean(0)
    genes = torch.randint(len(known), (population, count), generator=g)

    def said(gene):
        return " ".join(known[i] for i in gene.tolist())

    for step in range(1, steps + 1):
        began = time.perf_counter()
        losses = (states([said(gene) for gene in genes]) - target).pow(2).mean((1, 2))
        order = losses.cpu().argsort()
        genes, best = genes[order], losses[order[0].to(losses.device)].item()
        yield Sought(step, best, said(genes[0]), 0, time.perf_counter() - began)
        kept = genes[: population // 2]
        parents = kept[torch.randint(len(kept), (2, population - len(kept)), generator=g)]
        children = torch.where(torch.rand(parents[0].shape, generator=g) < 0.5, *parents)
        changed = torch.rand(len(children), generator=g) < mutation
        where = torch.randint(count, (len(children),), generator=g)
        children[changed, where[changed]] = torch.randint(
            len(known), (int(changed.sum()),), generator=g
        )
        genes = torch.cat([kept, children])


def random_words(pipe, prompt, *, count=3, steps=40, without=(), seed=0):
    """Random words before a prompt: the floor that an attack by prompts has to beat. Yields `Sought`, a new draw each step."""
    known, _ = _known(pipe, prompt, without, count)
    g = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        chosen = [known[i] for i in torch.randint(len(known), (count,), generator=g).tolist()]
        yield Sought(step, float("nan"), _before(chosen, prompt), 0, 0.0)


SEARCHES = ("random", "unlearn-diff-atk", "p4d", "ring-a-bell")


def seeker(
    search,
    pipe,
    original,
    concept_set,
    pairs=(),
    *,
    count=3,
    steps=40,
    lr=0.1,
    batch_size=8,
    strength=3.0,
    population=64,
    without=(),
    seed=0,
    loss_scale=1.0,
):
    """The function prompt → generator of `Sought` of a search by its name, with those of the parameters that it has. Raises ValueError for an unknown name."""
    common = dict(count=count, steps=steps, without=without, seed=seed)
    descent = dict(lr=lr, batch_size=batch_size, loss_scale=loss_scale)
    found = {
        "random": lambda prompt: random_words(pipe, prompt, **common),
        "unlearn-diff-atk": lambda prompt: unlearn_diff_atk(
            pipe, concept_set, prompt, **descent, **common
        ),
        "p4d": lambda prompt: p4d(pipe, original, concept_set, prompt, **descent, **common),
        "ring-a-bell": lambda prompt: ring_a_bell(
            pipe, prompt, pairs, strength=strength, population=population, **common
        ),
    }
    if search not in found:
        raise ValueError(f"unknown search {search!r}: allowed are {', '.join(SEARCHES)}")
    return found[search]
