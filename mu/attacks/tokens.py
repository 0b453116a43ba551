"""Words and token embeddings of the text encoders."""

import contextlib
import re

import torch

from mu.models import text_encoders


def tokenizers(pipe):
    """The one or two tokenizers of a pipeline, in the order of `text_encoders`."""
    return [
        part for part in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)) if part is not None
    ]


def words(pipe, without=()):
    """Words that are one token of every tokenizer and are read as themselves, sorted; none that occurs in the texts `without`.

    A prompt of such words is read as the attack meant it: pieces of words would be joined anew when their text is read."""
    left_out = {word for text in without for word in text.lower().replace(",", " ").split()}
    common = set.intersection(
        *(
            {t.removesuffix("</w>") for t in tokenizer.get_vocab() if t.endswith("</w>")}
            for tokenizer in tokenizers(pipe)
        )
    )
    known = sorted(
        word
        for word in common
        if word.isascii() and word.isalpha() and word == word.lower() and word not in left_out
    )
    whole = (
        [[len(ids) == 3 for ids in tokenizer(known).input_ids] for tokenizer in tokenizers(pipe)]
        if known
        else []
    )
    return [word for word, *fits in zip(known, *whole, strict=False) if all(fits)]


def ids_of(pipe, chosen):
    """Token ids of words, a list for each tokenizer."""
    return [[tokenizer(word).input_ids[1] for word in chosen] for tokenizer in tokenizers(pipe)]


def _whole(name):
    return re.compile(
        rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE
    )  # as a tokenizer reads it: no part of a longer word, in any case


def holds(text, name):
    """Whether the text has the whole word (or words) `name`, beside whatever marks."""
    return bool(_whole(name).search(text))


def swapped(text, name, other):
    """The text with `other` in the place of the whole word (or words) `name`."""
    return _whole(name).sub(lambda _: other, text)


@contextlib.contextmanager
def stand_in(pipe, chosen, vectors):
    """Inside the block the text encoder(s) read `vectors[e][k]` (e: encoder, k: word) where the k-th of the words `chosen` stands. Gradients reach the vectors."""

    def reader(ids, given):
        def replace(_, inputs, output):
            for k, token in enumerate(ids):
                output = torch.where((inputs[0] == token)[..., None], given[k].to(output), output)
            return output

        return replace

    hooks = [
        encoder.get_input_embeddings().register_forward_hook(reader(ids, given))
        for encoder, ids, given in zip(
            text_encoders(pipe), ids_of(pipe, chosen), vectors, strict=False
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def embeddings(pipe, chosen):
    """Rows of the text encoders' embedding tables for words: a tensor (words, width) for each encoder."""
    return [
        encoder.get_input_embeddings().weight.detach()[ids]
        for encoder, ids in zip(text_encoders(pipe), ids_of(pipe, chosen), strict=False)
    ]
