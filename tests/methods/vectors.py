"""Helpers of the tests of closed-form edits."""

import torch

from mu.methods.closed_form import concept_vectors, key_values


def outputs(unet, vectors):
    """Return keys and values of vectors (n, width), all matrices side by side."""
    return torch.cat([vectors @ w.detach().double().T for w in key_values(unet).values()], -1)


def positions(pipe, text, tokens):
    """Return the vectors of one text (`concept_vectors`)."""
    return concept_vectors(pipe, [text], tokens)[0]
