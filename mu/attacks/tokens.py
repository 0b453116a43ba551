"""Words and token embeddings of the text encoders."""

import contextlib
import re

import torch

from mu.models import text_encoders


def tokenizers(pipe):
    """Return the one or two tokenizers of a pipeline, in the order of `text_encoders`."""
    parts = (pipe.tokenizer, getattr(pipe, "tokenizer_2", None))
    return [part for part in parts if part is not None]


def split_words(text):
    """Return the words of a prompt, in lower case."""
    return text.lower().replace(",", " ").split()


def words(pipe, without=()):
    """Return the words that every tokenizer reads as one token; none of the texts `without`.

    A prompt of such words is read as the attack meant it: pieces of words would merge.
    """
    vocabularies = [
        {token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>")}
        for tokenizer in tokenizers(pipe)
    ]
    common = set.intersection(*vocabularies)
    left_out = {word for text in without for word in split_words(text)}
    plain = {word for word in common if word.isascii() and word.isalpha() and word == word.lower()}
    known = sorted(plain - left_out)
    for tokenizer in tokenizers(pipe):
        if known:
            ids = tokenizer(known).input_ids  # start, the word, end
            known = [word for word, tokens in zip(known, ids, strict=True) if len(tokens) == 3]
    return known


def ids_of(pipe, chosen):
    """Return the token ids of words, one list per tokenizer."""
    return [[tokenizer(word).input_ids[1] for word in chosen] for tokenizer in tokenizers(pipe)]


def whole_word(name):
    """Return a pattern of the whole word (or words) `name`, in any case, as tokenizers read it."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)


def holds(text, name):
    """Return whether `name` occurs in the text as a whole word."""
    return bool(whole_word(name).search(text))


def swapped(text, name, other):
    """Return the text with `other` in place of the whole word `name`."""
    return whole_word(name).sub(lambda _: other, text)


@contextlib.contextmanager
def stand_in(pipe, chosen, vectors):
    """Make the text encoders read `vectors[e][k]` for the k-th of the words `chosen`, in the block.

    e: the text encoder. Gradients reach the vectors.
    """

    def reader(ids, given):
        def replace(_, inputs, output):
            for k, token in enumerate(ids):
                output = torch.where((inputs[0] == token)[..., None], given[k].to(output), output)
            return output

        return replace

    parts = zip(text_encoders(pipe), ids_of(pipe, chosen), vectors, strict=True)
    hooks = [
        encoder.get_input_embeddings().register_forward_hook(reader(ids, given))
        for encoder, ids, given in parts
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def embeddings(pipe, chosen):
    """Return the embeddings of words, a tensor (words, width) for each text encoder."""
    parts = zip(text_encoders(pipe), ids_of(pipe, chosen), strict=True)
    return [encoder.get_input_embeddings().weight.detach()[ids] for encoder, ids in parts]
