"""Attacks by prompts: search for words that make an unlearned model draw its concept again.

No weights change. Learning an embedding is an attack by training: `mu.attacks.finetune.inversion`.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mu.attacks import tokens
from mu.losses import Term, draw_minibatch, gradients, predictions, squared_errors
from mu.models import encode_prompts, select
from mu.optimizers import descend
from mu.ranges import ANY, SHARE, check_ranges, count, positive

SEARCHES = ("random", "unlearn-diff-atk", "p4d", "ring-a-bell")


@dataclass(frozen=True)
class SearchStep:
    """What one step of a search found."""

    step: int  # number of steps done, this one included
    loss: float  # of the prompt, on this step's noise; nan for random words
    prompt: str  # before the step's update; Ring-A-Bell: the best so far
    passes: int  # forward passes of the UNet
    seconds: float


RANGES = {
    "count": count(1, 3),
    "steps": count(1, 40),
    "lr": positive(0.1),
    "batch_size": count(1, 8),
    "strength": ANY,
    "population": count(2, 64),
    "mutation": SHARE,
}


@dataclass(frozen=True)
class SearchConfig:
    """A search for words (`make_search`), as a notebook's parameters describe it."""

    count: int = 3  # words before the prompt
    steps: int = 40
    lr: float = 0.1  # of the searches by gradient, as are batch_size and loss_scale
    batch_size: int = 8
    strength: float = 3.0  # Ring-A-Bell: coefficient of the concept's direction
    population: int = 64  # Ring-A-Bell: of the genetic algorithm
    mutation: float = 0.25  # Ring-A-Bell: share of children with one random word
    without: tuple[str, ...] = ()  # texts whose words may not be used
    loss_scale: float = 1.0  # see `mu.losses.gradients`


def opposed(captions, name, others):
    """Return pairs (caption, caption with one of the `others` in place of `name`, in turn).

    For `ring_a_bell`. Raises ValueError for a caption without the name.
    """
    for caption in captions:
        tokens.require_word(caption, name)
    pairs = zip(captions, itertools.cycle(others), strict=False)
    return [(caption, tokens.replace_word(caption, name, other)) for caption, other in pairs]


def random_words(pipe, prompt, config, seed=0):
    """Yield random words before a prompt: the baseline that a search has to beat."""
    known, _ = known_words(pipe, prompt, config)
    g = torch.Generator().manual_seed(seed)
    for step in range(1, config.steps + 1):
        index = torch.randint(len(known), (config.count,), generator=g)
        found = " ".join([*(known[i] for i in index.tolist()), prompt])
        yield SearchStep(step, float("nan"), found, 0, 0.0)


def unlearn_diff_atk(pipe, concept_set, prompt, config, seed=0):
    """Search words with which the unlearned model denoises the concept's images; yields steps.

    UnlearnDiffAtk (Zhang et al. 2024): min over words w of E ‖ε − ε_θ(z_t, t, c(w, prompt))‖², a
    mean over elements, t over all timesteps, z_0 from concept_set. Signed gradient steps on the
    simplex over the vocabulary, projected back; straight through the likeliest word. Raises
    ValueError for a vocabulary that is too small, FloatingPointError for a loss that is not finite.
    """

    def target(batch):
        return batch.target, 0

    yield from search_by_gradient(pipe, concept_set, prompt, simplex_words, target, config, seed)


def p4d(pipe, original, concept_set, prompt, config, seed=0):
    """Search words with which the unlearned model predicts what the original does without them.

    P4D (Chin et al. 2024): min over words w of E ‖ε_0(z_t, t, c(prompt)) − ε_θ(z_t, t, c(w,
    prompt))‖². AdamW steps on free embeddings, straight through the nearest words' embeddings.
    original: ε_0, the UNet before unlearning. Yields and raises as `unlearn_diff_atk`.
    """
    rows = torch.zeros(config.batch_size, dtype=torch.long)
    plain = select(encode_prompts(pipe, [prompt], cut=True), rows)

    def target(batch):
        inputs = batch.inputs._replace(conditioning=plain)
        return predictions(original, [inputs])[0], 1

    yield from search_by_gradient(pipe, concept_set, prompt, free_words, target, config, seed)


def search_by_gradient(pipe, concept_set, prompt, variables, target, config, seed):
    """Search words by the gradient of E ‖target − ε_θ(z_t, t, c(words, prompt))‖²; yields steps.

    variables: see `simplex_words`. target: minibatch → (tensor, passes of a UNet).
    """
    known, places = known_words(pipe, prompt, config)
    text = " ".join([*places, prompt])
    g = torch.Generator().manual_seed(seed)
    start = torch.randint(len(known), (config.count,), generator=g)
    read, update = variables(pipe, known, start, config.lr)
    rows = torch.zeros(config.batch_size, dtype=torch.long)
    for step in range(1, config.steps + 1):
        began = time.perf_counter()
        parameters, index, vectors = read()
        with tokens.replaced_embeddings(pipe, places, vectors):
            conditioning = select(encode_prompts(pipe, [text], cut=True), rows)
        batch = draw_minibatch(concept_set, pipe.scheduler, config.batch_size, g)
        wanted, passes = target(batch)
        inputs = batch.inputs._replace(conditioning=conditioning)
        loss = squared_errors(pipe.unet, [Term("prompt", 1.0, inputs, wanted)])[0]
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of the prompt is {loss.item()} in step {step}: the model has diverged, "
                f"or the search needs a lower lr than {config.lr:g}"
            )
        update(gradients(loss, parameters, config.loss_scale))
        found = " ".join([*(known[i] for i in index.tolist()), prompt])
        yield SearchStep(step, loss.item(), found, 1 + passes, time.perf_counter() - began)


def simplex_words(pipe, known, start, lr):
    """Return UnlearnDiffAtk's (read, update): a point on the simplex over the words per position.

    read() returns (parameters, index of each position's word, embeddings with gradient).
    """
    tables = tokens.embeddings(pipe, known)
    u = torch.nn.functional.one_hot(start, len(known)).float().to(tables[0].device)
    u.requires_grad_(True)

    def read():
        index = u.argmax(-1)
        hard = torch.nn.functional.one_hot(index, len(known)).float()
        straight = hard + u - u.detach()
        return [u], index, [straight.to(table) @ table for table in tables]

    def update(gradient):
        u.data = project_to_simplex(u.data - lr * gradient[0].sign())

    return read, update


def free_words(pipe, known, start, lr):
    """Return P4D's (read, update): a free embedding per position, read as the nearest (cosine)."""
    tables = tokens.embeddings(pipe, known)
    vectors = [table[start.to(table.device)].clone().requires_grad_(True) for table in tables]
    optimizer = torch.optim.AdamW(vectors, lr=lr, weight_decay=0.1)
    unit = torch.nn.functional.normalize
    pairs = list(zip(vectors, tables, strict=True))

    def read():
        index = sum(unit(v.detach()) @ unit(table).T for v, table in pairs).argmax(-1)
        return vectors, index, [table[index] + v - v.detach() for v, table in pairs]

    return read, partial(descend, vectors, optimizer=optimizer)


def project_to_simplex(u):
    """Return the nearest point to each row on the probability simplex (Duchi et al. 2008)."""
    ordered = u.sort(descending=True).values
    excess = (ordered.cumsum(-1) - 1) / torch.arange(1, u.shape[-1] + 1, device=u.device)
    last = (ordered > excess).sum(-1, keepdim=True) - 1
    return (u - excess.gather(-1, last)).clamp(min=0)


def known_words(pipe, prompt, config):
    """Return the words to choose from, and placeholders that do not occur in the prompt.

    Raises ValueError if there are fewer than `config.count`.
    """
    known = tokens.words(pipe, config.without)
    places = [word for word in known if word not in tokens.split_words(prompt)][: config.count]
    if len(places) < config.count:
        raise ValueError(
            f"{config.count} words before {prompt!r}, but the vocabulary has only {len(known)} "
            "words to use: choose a smaller count, or exclude fewer words"
        )
    return known, places


@torch.no_grad()
def ring_a_bell(pipe, prompt, pairs, config, seed=0):
    """Search words whose encoding is the prompt's, moved towards the concept; yields generations.

    Ring-A-Bell (Tsai et al. 2024): min over words of ‖f(words) − f(prompt) − strength ·
    mean_i [f(with_i) − f(without_i)]‖², a mean over elements, f: states of the text encoder. A
    genetic algorithm: the better half survives, children take each word from one of two parents,
    and some get one random word. pairs: (text with the concept, the same text without). Needs
    neither UNet nor images, so one result serves all models with this text encoder.
    """
    known, _ = known_words(pipe, prompt, config)
    g = torch.Generator().manual_seed(seed)

    def states(texts):
        return encode_prompts(pipe, texts, cut=True)["encoder_hidden_states"].float()

    def text(gene):
        return " ".join(known[i] for i in gene.tolist())

    direction = states([a for a, _ in pairs]) - states([b for _, b in pairs])
    target = states([prompt]) + config.strength * direction.mean(0)
    genes = torch.randint(len(known), (config.population, config.count), generator=g)
    for step in range(1, config.steps + 1):
        began = time.perf_counter()
        losses = (states([text(gene) for gene in genes]) - target).pow(2).mean((1, 2))
        order = losses.cpu().argsort()
        genes, best = genes[order], losses[order[0].to(losses.device)].item()
        yield SearchStep(step, best, text(genes[0]), 0, time.perf_counter() - began)
        genes = next_generation(genes, len(known), config.mutation, g)


def next_generation(genes, vocabulary, mutation, generator):
    """Return the better half of sorted genes and its children."""
    kept = genes[: len(genes) // 2]
    index = torch.randint(len(kept), (2, len(genes) - len(kept)), generator=generator)
    parents = kept[index]
    children = torch.where(torch.rand(parents[0].shape, generator=generator) < 0.5, *parents)
    mutated = torch.rand(len(children), generator=generator) < mutation
    position = torch.randint(genes.shape[1], (len(children),), generator=generator)
    new = torch.randint(vocabulary, (int(mutated.sum()),), generator=generator)
    children[mutated, position[mutated]] = new
    return torch.cat([kept, children])


def make_search(search, pipe, original, concept_set, pairs, config, seed=0) -> Callable:
    """Return a function prompt → generator of `SearchStep` of a search by its name.

    original: for p4d. concept_set: for p4d and unlearn-diff-atk. pairs: for ring-a-bell. Raises
    ValueError for an unknown name and for settings out of range.
    """
    check_ranges(vars(config), RANGES)
    options = dict(config=config, seed=seed)
    searches = {
        "random": partial(random_words, pipe, **options),
        "unlearn-diff-atk": partial(unlearn_diff_atk, pipe, concept_set, **options),
        "p4d": partial(p4d, pipe, original, concept_set, **options),
        "ring-a-bell": partial(ring_a_bell, pipe, pairs=pairs, **options),
    }
    if search not in searches:
        raise ValueError(f"unknown search {search!r}: choose {', '.join(SEARCHES)}")
    return searches[search]
