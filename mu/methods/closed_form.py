"""Unlearning without training: UCE and RECE edit cross-attention keys and values in closed form.

Only `attn2.to_k` and `attn2.to_v` of the UNet change. All of them act on the same text-encoder
states, so one right factor edits them all. SDXL's pooled text embedding is not edited.
"""

import dataclasses

import torch

from mu.models import encode_prompts


@dataclasses.dataclass(frozen=True)
class EditConfig:
    """Weights and tokens of a closed-form edit; the defaults are UCE's."""

    ridge: float = 0.5  # λ of `edit_matrices`
    erase: float = 1.0  # e, of each vector to erase
    keep: float | None = None  # p, of each preserved vector; None: max(0.1, 1 / preserved texts)
    tokens: str = "rest"  # see `concept_vectors`
    adversarial_ridge: float = 0.1  # λ of `adversarial_vectors`, RECE only


RECE = EditConfig(ridge=0.1, keep=0.1, tokens="all")


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Record of one RECE epoch."""

    epoch: int  # from 1
    adversarial: float  # ‖c'‖ / ‖c‖, of the vectors that reached the concepts before this edit
    recovered: float  # share of the original keys and values that c' brought back; 1: all
    changes: dict  # name → ‖W − W₀‖ / ‖W₀‖ of this edit


def key_values(unet):
    """Return name → cross-attention key or value matrix (out, width). ValueError if none."""
    endings = ("attn2.to_k.weight", "attn2.to_v.weight")
    matrices = {name: p for name, p in unet.named_parameters() if name.endswith(endings)}
    if not matrices:
        raise ValueError("the UNet has no attn2.to_k: needs cross attention, and a LoRA merged")
    return matrices


def _exact(x):
    # nearly equal states of padding tokens need float64, which MPS lacks
    return (x.cpu() if x.device.type == "mps" else x).double()


def _list(texts):
    return [texts] if isinstance(texts, str) else list(texts)


@torch.no_grad()
def concept_vectors(pipe, texts, tokens="rest"):
    """Return the text-encoder states that edit each text: list of (positions, width), float64.

    tokens: "last" is the last token before end-of-text (UCE's newer code), "rest" all positions
    from there (UCE's first code), "all" every position (RECE's code). The last token of an empty
    text is start-of-text, as in the official code. An empty text is encoded as " ": some SDXL
    models encode "" as zeros, which would set keys and values to zero. Raises ValueError for other
    `tokens` and for texts that are too long.
    """
    if tokens not in ("last", "rest", "all"):
        raise ValueError(f"unknown tokens {tokens!r}: choose last, rest, all")
    vectors = []
    for text in texts:  # one by one, so that vectors do not depend on the batch
        states = encode_prompts(pipe, [text or " "])["encoder_hidden_states"][0]
        last = len(pipe.tokenizer(text).input_ids) - 2  # unpadded: start, …, last, end
        ranges = {"last": slice(last, last + 1), "rest": slice(last, None), "all": slice(None)}
        vectors.append(_exact(states[ranges[tokens]].clone()))
    return vectors


def _vectors(pipe, forget, replace, preserve, config):
    """Return c, c* (n, width; aligned at their first positions), k (m, width), config with p."""
    forget, preserve = _list(forget), _list(preserve)
    replace = [replace] * len(forget) if isinstance(replace, str) else list(replace)
    if not forget or not all(text.strip() for text in forget):
        raise ValueError(f"nothing to forget in {forget!r}: name at least one concept, none blank")
    if len(replace) != len(forget):
        raise ValueError(f"{len(replace)} texts replace {len(forget)} concepts: give one for each")
    old, new, kept = ([x.strip().lower() for x in texts] for texts in (forget, replace, preserve))
    clash = {a for a, b in zip(old, new, strict=True) if a == b or a in kept}
    if clash:
        raise ValueError(f"forgotten and kept: {', '.join(sorted(clash))}; remove from one list")
    originals = concept_vectors(pipe, forget, config.tokens)
    targets = concept_vectors(pipe, replace, config.tokens)
    pairs = list(zip(originals, targets, strict=True))
    c = torch.cat([a[: len(b)] for a, b in pairs])
    targets = torch.cat([b[: len(a)] for a, b in pairs])
    kept = concept_vectors(pipe, preserve, "last" if config.tokens == "last" else "all")
    if config.keep is None:
        config = dataclasses.replace(config, keep=max(0.1, 1 / max(1, len(preserve))))
    return c, targets, torch.cat([c[:0], *kept]), config


def edit_matrices(matrices, c, targets, kept, config):
    """Set each matrix W, in place, to the minimiser of UCE's objective (eq. 7).

    The objective is e Σ ‖W c − W₀ c*‖² + p Σ ‖W k − W₀ k‖² + λ ‖W − W₀‖². Its minimiser is
    W = (λ W₀ + e Σ W₀ c* cᵀ + p Σ W₀ k kᵀ) A⁻¹ = W₀ [I + e Σ (c* − c) cᵀ A⁻¹], where
    A = λ I + e Σ c cᵀ + p Σ k kᵀ.
    matrices: name → W₀ (out, width). c, targets (c*): (n, width). kept (k): (m, width), m may be 0.
    Returns name → ‖W − W₀‖ / ‖W₀‖. Raises ValueError for weights without a unique minimum and for
    a result that is not finite, before any matrix changes.
    """
    ridge, erase, keep = config.ridge, config.erase, config.keep
    if not (ridge > 0 and erase > 0 and keep >= 0):
        raise ValueError(f"needs ridge, erase > 0 and keep >= 0, got {ridge=}, {erase=}, {keep=}")
    identity = torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    system = ridge * identity + erase * c.T @ c + keep * kept.T @ kept
    factor = erase * (targets - c).T @ torch.linalg.solve(system, c.T).T
    edited, changes = {}, {}
    for name, w in matrices.items():
        change = _exact(w) @ factor
        edited[name] = (_exact(w) + change).to(w)
        changes[name] = (change.norm() / _exact(w).norm()).item()
        if not torch.isfinite(edited[name]).all():
            raise ValueError(f"{name} would hold NaN or infinity in {w.dtype}: raise ridge")
    for name, w in matrices.items():
        w.copy_(edited[name])
    return changes


@torch.no_grad()
def uce(pipe, forget, replace=" ", preserve=(), config=EditConfig()):
    """Edit pipe.unet by Unified Concept Editing (Gandikota et al., WACV 2024), in place.

    forget: one concept or several. replace: what they become, one text for all or one each.
    preserve: texts whose keys and values stay; with tokens "last" their last token counts, else
    all positions (UCE's first code preserves "" by default). Returns name → relative change.
    Raises ValueError, before anything changes, for nothing to forget, lists of different lengths,
    a text on both sides, a UNet without cross attention and a result that is not finite.
    """
    matrices = key_values(pipe.unet)
    return edit_matrices(matrices, *_vectors(pipe, forget, replace, preserve, config))


@torch.no_grad()
def adversarial_vectors(unet, unet_frozen, c, ridge=0.1):
    """Return c' that `unet` takes for what `unet_frozen` took c for, and the share recovered.

    c' = (λ I + Σ WᵢᵀWᵢ)⁻¹ (Σ WᵢᵀWᵢ⁰) c minimises Σ ‖Wᵢ c' − Wᵢ⁰ c‖² + λ ‖c'‖² over all key and
    value matrices i (RECE, Gong et al., ECCV 2024). c, c': (n, width), float64. The share is
    1 − Σ ‖Wᵢ c' − Wᵢ⁰ c‖² / Σ ‖Wᵢ⁰ c‖². Raises ValueError if the UNets differ in their matrices.
    """
    edited, original = key_values(unet), key_values(unet_frozen)
    shapes, frozen_shapes = ({n: w.shape for n, w in x.items()} for x in (edited, original))
    if shapes != frozen_shapes:
        raise ValueError("unet_frozen must be a copy of the UNet from before the edit")
    system, right, total = ridge * torch.eye(c.shape[1], dtype=c.dtype, device=c.device), 0, 0
    for name, w in edited.items():
        w, output = _exact(w), _exact(original[name]) @ c.T
        system = system + w.T @ w
        right = right + w.T @ output
        total = total + output.square().sum()
    found = torch.linalg.solve(system, right)
    explained = (right * found).sum() + ridge * found.square().sum()  # the squares, multiplied out
    return found.T, (explained / total).item()


@torch.no_grad()
def rece(pipe, unet_frozen, forget, replace=" ", preserve=(), epochs=3, config=RECE):
    """Edit pipe.unet by RECE (Gong et al., ECCV 2024) after `uce`, in place; yields `Epoch`s.

    Each epoch finds what the UNet still takes for the concepts (`adversarial_vectors`) and maps
    it to `replace`, as `uce` does; W₀ are the present weights. unet_frozen: a copy from before UCE.
    Defaults are the official ones; styles use epochs=1 and adversarial_ridge=1e-3. The official
    code selects the epoch with the lowest NudeNet rate; this one runs all and selects none.
    With tokens "last" the concept itself can return, since only c' is edited.
    Raises ValueError as `uce` does.
    """
    c, targets, kept, config = _vectors(pipe, forget, replace, preserve, config)
    for epoch in range(1, epochs + 1):
        found, recovered = adversarial_vectors(pipe.unet, unet_frozen, c, config.adversarial_ridge)
        changes = edit_matrices(key_values(pipe.unet), found, targets, kept, config)
        yield Epoch(epoch, (found.norm() / c.norm()).item(), recovered, changes)
