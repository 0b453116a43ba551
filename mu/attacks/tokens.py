"""Words and token embeddings of the text encoders."""

import contextlib
import re
from functools import partial

import torch

from mu.models import text_encoders, tokenizers


def split_words(text):
    """Return the words of a prompt, in lower case."""
    return text.lower().replace(",", " ").split()


def words(pipe, without=()):
    """Return the words that are one token of every tokenizer, sorted; none of the texts `without`.

    A prompt of such words is tokenized word by word; pieces of words could merge.
    """
    vocabularies = [
        {token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>")}
        for tokenizer in tokenizers(pipe)
    ]
    common = set.intersection(*vocabularies)
    left_out = {word for text in without for word in split_words(text)}
    plain = {word for word in common if word.isascii() and word.isalpha() and word.islower()}
    known = sorted(plain - left_out)
    for tokenizer in tokenizers(pipe):
        if known:
            ids = tokenizer(known).input_ids  # start, the word, end
            known = [word for word, tokens in zip(known, ids, strict=True) if len(tokens) == 3]
    return known


def token_ids(pipe, chosen):
    """Return the token ids of words, one list per tokenizer."""
    return [[tokenizer(word).input_ids[1] for word in chosen] for tokenizer in tokenizers(pipe)]


def whole_word(name):
    """Return a pattern of the whole word (or words) `name`, in any case."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)


def contains_word(text, name):
    """Return whether `name` occurs in the text as a whole word."""
    return bool(whole_word(name).search(text))


def replace_word(text, name, other):
    """Return the text with `other` in place of the whole word `name`."""
    return whole_word(name).sub(lambda _: other, text)


def require_word(text, name):
    """Raise ValueError for a text without the whole word `name`."""
    if not contains_word(text, name):
        fix = "set concept_token to the concept's name in captions and forget prompts"
        raise ValueError(f"{text!r} does not contain the word {name!r}: {fix}")


@contextlib.contextmanager
def replaced_embeddings(pipe, chosen, vectors):
    """Replace the embeddings of words in the block; gradients reach the vectors.

    vectors: one tensor (words, width) per text encoder.
    """
    parts = zip(text_encoders(pipe), token_ids(pipe, chosen), vectors, strict=True)
    with contextlib.ExitStack() as hooks:
        for encoder, ids, rows in parts:
            hook = partial(replace_rows, ids, rows)
            hooks.enter_context(encoder.get_input_embeddings().register_forward_hook(hook))
        yield


def replace_rows(ids, rows, _, inputs, output):
    """Forward hook of an embedding table: return `rows` where the input is one of `ids`."""
    for token, row in zip(ids, rows, strict=True):
        output = torch.where((inputs[0] == token)[..., None], row.to(output), output)
    return output


def embeddings(pipe, chosen):
    """Return the embeddings of words: one tensor (words, width) per text encoder."""
    parts = zip(text_encoders(pipe), token_ids(pipe, chosen), strict=True)
    return [encoder.get_input_embeddings().weight.detach()[ids] for encoder, ids in parts]
