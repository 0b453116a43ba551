"""Unlearning without training: UCE and RECE move the cross-attention keys and values of a concept onto those of another text.

Only `attn2.to_k` and `attn2.to_v` of the UNet change. All act on the same states of the text encoder(s) (`mu.models.encode_prompts`), so
one right factor serves them all, for SD and SDXL alike. What SDXL's pooled text embedding says of a concept is not edited."""

from dataclasses import dataclass

import torch

from mu.models import encode_prompts


@dataclass(frozen=True)
class Epoch:
    epoch: int  # epochs done, this one included
    adversarial: float  # ‖c'‖ / ‖c‖ over all edited vectors; near 0 the concept cannot be reached by any input of the matrices
    changes: dict  # name → ‖W − W_before‖ / ‖W_before‖ of this epoch's edit


def key_values(unet):
    """Name → every cross-attention key and value matrix (out, width). Raises ValueError if there are none."""
    found = {name: p for name, p in unet.named_parameters() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    if not found:
        raise ValueError("this UNet has no attn2.to_k and attn2.to_v, nothing that UCE could edit: give one with cross attention, a LoRA merged into it")
    return found


def _exact(x):
    """float64, where the device has it: padding tokens are nearly equal, so that sums of their c cᵀ are too ill-conditioned for less."""
    return (x.cpu() if x.device.type == "mps" else x).double()


@torch.no_grad()
def concept_vectors(pipe, texts, tokens="last"):
    """The states of the text encoder(s) by which each text is edited: list of (positions, width), float64.

    tokens="last": the last token before end-of-text (newer UCE code). "rest": from there to the end of the padded sequence (older UCE code).
    "all": every position (RECE's code, and what the older UCE code preserves).
    An empty or blank text has no token: its last one is start-of-text, as in the official code. It is encoded as " ", since an SDXL that
    puts zeros for "" would give an all-zero target, which means no keys and values rather than those of a neutral text.
    Raises ValueError for another `tokens` and for a text that is too long."""
    if tokens not in ("last", "rest", "all"):
        raise ValueError(f"unknown tokens {tokens!r}: allowed are last, rest, all")
    vectors = []
    for text in texts:  # one by one: a text's vectors then do not depend on its neighbours, nor memory on their number
        last = len(pipe.tokenizer(text).input_ids) - 2  # of the unpadded text, since CLIP pads with end-of-text
        states = encode_prompts(pipe, [text or " "])["encoder_hidden_states"][0]
        vectors.append(_exact(states[0 if tokens == "all" else last:last + 1 if tokens == "last" else None].clone()))
    return vectors


def _edit(matrices, c, targets, kept, *, ridge, erase, keep):
    """The minimiser of e Σ ‖W c − W₀ c*‖² + p Σ ‖W k − W₀ k‖² + λ ‖W − W₀‖² (UCE, eq. 7), put into every one of `matrices` (out, width):

        W = (λ W₀ + e Σ W₀ c* cᵀ + p Σ W₀ k kᵀ) A⁻¹ = W₀ [I + e Σ (c* − c) cᵀ A⁻¹],   A = λ I + e Σ c cᵀ + p Σ k kᵀ.

    c, targets (the c*): (n, width), kept (the k): (m, width), m may be 0. The bracket is the same for all matrices.
    Returns name → ‖W − W₀‖ / ‖W₀‖. Raises ValueError for weights that leave no unique minimum and for a result that is not finite; nothing is edited then."""
    if not (ridge > 0 and erase > 0 and keep >= 0):
        raise ValueError(f"ridge and erase must be positive, keep not negative: got ridge={ridge}, erase={erase}, keep={keep}")
    system = ridge * torch.eye(c.shape[1], dtype=c.dtype, device=c.device) + erase * c.T @ c + keep * kept.T @ kept
    step = erase * (targets - c).T @ torch.linalg.solve(system, c.T).T
    edited, changes = {}, {}
    for name, w in matrices.items():
        change = _exact(w) @ step
        edited[name], changes[name] = (_exact(w) + change).to(w), (change.norm() / _exact(w).norm()).item()
        if not torch.isfinite(edited[name]).all():
            raise ValueError(f"{name} would hold NaN or infinite values: the weights or text states do already, or {w.dtype} overflows (raise ridge)")
    for name, w in matrices.items():
        w.copy_(edited[name])
    return changes


def _vectors(pipe, forget, replace, preserve, tokens):
    """c, c* (n, width each, position by position) and the kept vectors (m, width) of the texts, checked."""
    forget, preserve = ([texts] if isinstance(texts, str) else list(texts) for texts in (forget, preserve))
    replace = [replace] * len(forget) if isinstance(replace, str) else list(replace)
    if not forget or not all(text.strip() for text in forget):
        raise ValueError(f"nothing to forget in {forget!r}: name at least one concept, none of them blank")
    if len(replace) != len(forget):
        raise ValueError(f"{len(replace)} texts to replace {len(forget)} concepts: give one for all, or as many as concepts")
    both = {text.strip().lower() for text in forget} & {text.strip().lower() for text in preserve}
    if both:
        raise ValueError(f"to forget and to preserve at once: {', '.join(sorted(both))}; take it out of one of the lists")
    c, targets = concept_vectors(pipe, forget, tokens), concept_vectors(pipe, replace, tokens)
    kept = concept_vectors(pipe, preserve, "last" if tokens == "last" else "all")
    pairs = [(a[:len(b)], b[:len(a)]) for a, b in zip(c, targets)]  # aligned at their first position; the longer one's end is left out
    c, targets = (torch.cat(x) for x in zip(*pairs))
    return c, targets, torch.cat([c[:0], *kept])


@torch.no_grad()
def uce(pipe, forget, replace=" ", preserve=(), *, ridge=0.5, erase=1.0, keep=None, tokens="last"):
    """Unified Concept Editing (Gandikota et al., WACV 2024) of pipe.unet, in place: see `_edit` for the objective.

    forget: a concept or several at once. replace: the text they become, or one for each. preserve: concepts whose keys and values stay.
    ridge: λ. erase: e. keep: p of each preserved vector, max(0.1, 1/number of preserved concepts) by default. tokens: see `concept_vectors`;
    of preserved texts "last" takes the last token, the others all positions (the older code preserves "" when nothing else is).
    Returns name of each edited matrix → its relative change. Raises ValueError for nothing to forget, lists that do not fit, a concept on both
    sides, a UNet without cross attention, a result that is not finite; the UNet is as before then."""
    matrices = key_values(pipe.unet)
    c, targets, kept = _vectors(pipe, forget, replace, preserve, tokens)
    n = 1 if isinstance(preserve, str) else max(1, len(preserve))
    return _edit(matrices, c, targets, kept, ridge=ridge, erase=erase, keep=max(0.1, 1 / n) if keep is None else keep)


@torch.no_grad()
def adversarial_vectors(unet, unet_frozen, c, ridge=0.1):
    """c' = (λ I + Σ WᵢᵀWᵢ)⁻¹ (Σ Wᵢᵀ Wᵢ⁰) c, whose keys and values in the edited `unet` come nearest to those of c in `unet_frozen`.

    The minimiser of Σ ‖Wᵢ c' − Wᵢ⁰ c‖² + λ ‖c'‖², i over all key and value matrices (RECE, Gong et al., ECCV 2024). c and c': (n, width), float64.
    Raises ValueError for UNets that do not fit each other."""
    matrices, original = key_values(unet), key_values(unet_frozen)
    if {name: w.shape for name, w in matrices.items()} != {name: w.shape for name, w in original.items()}:
        raise ValueError("unet and unet_frozen have other keys and values: unet_frozen is to be a copy of the UNet from before the edit")
    pairs = [(_exact(w), _exact(original[name])) for name, w in matrices.items()]
    system = sum(w.T @ w for w, _ in pairs) + ridge * torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    return torch.linalg.solve(system, sum(w.T @ w0 for w, w0 in pairs) @ c.T).T


@torch.no_grad()
def rece(pipe, unet_frozen, forget, replace=" ", preserve=(), *, epochs=3, adversarial_ridge=0.1, ridge=0.1, erase=1.0, keep=0.1, tokens="all"):
    """RECE (Gong et al., ECCV 2024) from the UCE result in pipe.unet, in place; a generator that yields an `Epoch` after each edit.

    An epoch finds what the UNet still takes for the concepts (`adversarial_vectors`) and edits it, as `uce` does, to what it takes for `replace`;
    W₀ of that edit are the present weights. unet_frozen: a copy from before UCE. Official values: epochs 3, adversarial_ridge 0.1 (nudity), or
    1 and 1e-3 (styles); ridge 0.1, all positions. The official code keeps the epoch with the lowest NudeNet rate on validation prompts;
    here every epoch is done and nothing is selected. Raises ValueError as `uce` and `adversarial_vectors` do."""
    c, targets, kept = _vectors(pipe, forget, replace, preserve, tokens)
    for epoch in range(epochs):
        adversarial = adversarial_vectors(pipe.unet, unet_frozen, c, adversarial_ridge)
        changes = _edit(key_values(pipe.unet), adversarial, targets, kept, ridge=ridge, erase=erase, keep=keep)
        yield Epoch(epoch + 1, (adversarial.norm() / c.norm()).item(), changes)
