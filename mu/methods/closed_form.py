"""Unlearning without training: UCE and RECE move the cross-attention keys and values of a concept onto those of another text.

Only `attn2.to_k` and `attn2.to_v` of the UNet change. All act on the same states of the text encoder(s) (`mu.models.encode_prompts`), so
that one right factor serves them all, for SD and SDXL alike. What SDXL's pooled text embedding says of a concept is not edited."""

from dataclasses import dataclass

import torch

from mu.models import encode_prompts


@dataclass(frozen=True)
class Epoch:
    epoch: int  # epochs done, this one included
    adversarial: (
        float  # ‖c'‖ / ‖c‖, of the vectors that still reached the concepts before this epoch's edit
    )
    recovered: (
        float  # share of the concepts' original keys and values that they brought back, 1 = all
    )
    changes: dict  # name → ‖W − W₀‖ / ‖W₀‖ of this epoch's edit


def key_values(unet):
    """Name → every cross-attention key and value matrix (out, width). Raises ValueError if there are none."""
    found = {
        name: p
        for name, p in unet.named_parameters()
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    if not found:
        raise ValueError(
            "this UNet has no attn2.to_k and attn2.to_v to edit: give one with cross attention, and merge a LoRA into it first"
        )
    return found


def _exact(x):
    """float64: the states of padding tokens are nearly equal, which makes sums of c cᵀ too ill-conditioned for less. Not every device has it."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def _list(texts):
    return [texts] if isinstance(texts, str) else list(texts)


@torch.no_grad()
def concept_vectors(pipe, texts, tokens="rest"):
    """The states of the text encoder(s) by which each text is edited: list of (positions, width), float64.

    tokens="rest": from the last token before end-of-text to the end of the padded sequence (UCE's first code). "last": that token alone
    (UCE's newer code). "all": every position (RECE's code, and what UCE's first code preserves). An empty or blank text has no token: its
    last one is start-of-text, as in the official code. Both are encoded as " ", since an SDXL that has zeros for "" would give an all-zero
    target: no keys and values, rather than those of a text that says nothing. Raises ValueError for other `tokens` and for too long a text."""
    if tokens not in ("last", "rest", "all"):
        raise ValueError(f"unknown tokens {tokens!r}: allowed are last, rest, all")
    vectors = []
    for text in texts:  # one by one: a text's vectors do not depend on the others then, nor the memory on their number
        states = encode_prompts(pipe, [text or " "])["encoder_hidden_states"][0]
        last = len(pipe.tokenizer(text).input_ids) - 2  # without padding, which is end-of-text too
        vectors.append(
            _exact(
                states[
                    {"last": slice(last, last + 1), "rest": slice(last, None), "all": slice(None)}[
                        tokens
                    ]
                ].clone()
            )
        )
    return vectors


def _vectors(pipe, forget, replace, preserve, tokens):
    """c, c* (n, width each; the positions of a text and of its replacement aligned at the first) and the preserved vectors (m, width)."""
    forget, preserve = _list(forget), _list(preserve)
    replace = [replace] * len(forget) if isinstance(replace, str) else list(replace)
    if not forget or not all(text.strip() for text in forget):
        raise ValueError(
            f"nothing to forget in {forget!r}: name at least one concept, and none that is blank"
        )
    if len(replace) != len(forget):
        raise ValueError(
            f"{len(replace)} texts replace {len(forget)} concepts: give one for all, or one for each"
        )

    def folded(texts):
        return [text.strip().lower() for text in texts]

    clash = sorted(
        {
            f
            for f, r in zip(folded(forget), folded(replace), strict=False)
            if f == r or f in folded(preserve)
        }
    )
    if clash:
        raise ValueError(
            f"to forget, and to preserve or to become the same: {', '.join(clash)}; take it out of one of the lists"
        )
    pairs = zip(
        *(concept_vectors(pipe, texts, tokens) for texts in (forget, replace)), strict=False
    )
    c, targets = (
        torch.cat(x) for x in zip(*((a[: len(b)], b[: len(a)]) for a, b in pairs), strict=False)
    )
    return (
        c,
        targets,
        torch.cat([c[:0], *concept_vectors(pipe, preserve, "last" if tokens == "last" else "all")]),
    )


def _edit(matrices, c, targets, kept, *, ridge, erase, keep):
    """Puts into each of `matrices` (out, width) the minimiser of e Σ ‖W c − W₀ c*‖² + p Σ ‖W k − W₀ k‖² + λ ‖W − W₀‖² (UCE, eq. 7):

        W = (λ W₀ + e Σ W₀ c* cᵀ + p Σ W₀ k kᵀ) A⁻¹ = W₀ [I + e Σ (c* − c) cᵀ A⁻¹],   A = λ I + e Σ c cᵀ + p Σ k kᵀ.

    c, targets (the c*): (n, width), kept (the k): (m, width), m may be 0. Returns name → ‖W − W₀‖ / ‖W₀‖.
    Raises ValueError for weights without a unique minimum and for a result that is not finite; nothing is edited then."""
    if not (ridge > 0 and erase > 0 and keep >= 0):
        raise ValueError(
            f"ridge and erase must be positive, keep not negative: got ridge={ridge}, erase={erase}, keep={keep}"
        )
    system = (
        ridge * torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
        + erase * c.T @ c
        + keep * kept.T @ kept
    )
    factor = erase * (targets - c).T @ torch.linalg.solve(system, c.T).T
    edited, changes = {}, {}
    for name, w in matrices.items():
        change = _exact(w) @ factor
        edited[name], changes[name] = (
            (_exact(w) + change).to(w),
            (change.norm() / _exact(w).norm()).item(),
        )
        if not torch.isfinite(edited[name]).all():
            raise ValueError(
                f"{name} would hold NaN or infinite values: it or the text's states do already, or {w.dtype} overflows (raise ridge)"
            )
    for name, w in matrices.items():
        w.copy_(edited[name])
    return changes


@torch.no_grad()
def uce(pipe, forget, replace=" ", preserve=(), *, ridge=0.5, erase=1.0, keep=None, tokens="rest"):
    """Unified Concept Editing (Gandikota et al., WACV 2024) of pipe.unet, in place; the objective is in `_edit`.

    forget: a concept, or several at once. replace: what they become, one text for all or one each. preserve: texts whose keys and values
    stay. ridge: λ. erase: e. keep: p of each preserved vector, by default max(0.1, 1/number of preserved texts). tokens: see
    `concept_vectors`; of preserved texts "last" takes the last token, else all positions count (UCE's first code preserves "" if nothing else).
    Returns name of each matrix → its relative change. Raises ValueError for nothing to forget, lists that do not fit, a text on both sides,
    a UNet without cross attention and a result that is not finite; the UNet is as before then."""
    matrices, preserve = key_values(pipe.unet), _list(preserve)
    keep = max(0.1, 1 / max(1, len(preserve))) if keep is None else keep
    return _edit(
        matrices,
        *_vectors(pipe, forget, replace, preserve, tokens),
        ridge=ridge,
        erase=erase,
        keep=keep,
    )


@torch.no_grad()
def adversarial_vectors(unet, unet_frozen, c, ridge=0.1):
    """c' = (λ I + Σ WᵢᵀWᵢ)⁻¹ (Σ WᵢᵀWᵢ⁰) c: what the edited `unet` takes for what `unet_frozen` took c for (RECE, Gong et al., ECCV 2024).

    The minimiser of Σ ‖Wᵢ c' − Wᵢ⁰ c‖² + λ ‖c'‖² over all key and value matrices i. c: (n, width), float64. Returns c' (n, width) and the
    share recovered, 1 − Σ ‖Wᵢ c' − Wᵢ⁰ c‖² / Σ ‖Wᵢ⁰ c‖². Raises ValueError for UNets that do not fit each other."""
    edited, original = key_values(unet), key_values(unet_frozen)
    if {name: w.shape for name, w in edited.items()} != {
        name: w.shape for name, w in original.items()
    }:
        raise ValueError(
            "unet_frozen has other keys and values than unet: give a copy of the UNet from before the edit"
        )
    system, right, total = ridge * torch.eye(c.shape[1], dtype=c.dtype, device=c.device), 0, 0
    for name, w in edited.items():
        w, sought = _exact(w), _exact(original[name]) @ c.T
        system, right, total = system + w.T @ w, right + w.T @ sought, total + sought.square().sum()
    found = torch.linalg.solve(system, right)
    return found.T, (
        ((right * found).sum() + ridge * found.square().sum()) / total
    ).item()  # the sums of squares, multiplied out


@torch.no_grad()
def rece(
    pipe,
    unet_frozen,
    forget,
    replace=" ",
    preserve=(),
    *,
    epochs=3,
    adversarial_ridge=0.1,
    ridge=0.1,
    erase=1.0,
    keep=0.1,
    tokens="all",
):
    """RECE (Gong et al., ECCV 2024) from the UCE result in pipe.unet, in place: a generator that yields an `Epoch` after each edit.

    An epoch finds what the UNet still takes for the concepts (`adversarial_vectors`) and edits that, as `uce` does, to what it takes for
    `replace`; W₀ of this edit are the present weights. unet_frozen: a copy from before UCE. Official values are the defaults; for styles
    epochs=1, adversarial_ridge=1e-3. The official code keeps the epoch with the lowest NudeNet rate on validation prompts; here all epochs are
    done and none is selected. "last" lets the concept itself come back, for only c' is edited then. Raises ValueError as `uce` does."""
    c, targets, kept = _vectors(pipe, forget, replace, preserve, tokens)
    for epoch in range(1, epochs + 1):
        adversarial, recovered = adversarial_vectors(pipe.unet, unet_frozen, c, adversarial_ridge)
        changes = _edit(
            key_values(pipe.unet), adversarial, targets, kept, ridge=ridge, erase=erase, keep=keep
        )
        yield Epoch(epoch, (adversarial.norm() / c.norm()).item(), recovered, changes)
