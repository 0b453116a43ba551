"""Words and token embeddings: texts are tokenized word by word, gradients reach the vectors."""

import pytest
import torch

from mu.attacks.tokens import embeddings, replaced_embeddings, tokenizers, words
from mu.models import encode_prompts


def test_a_prompt_of_words_is_tokenized_word_by_word(either):
    known = words(either, without=["a Tiger, a cup"])
    assert "cat" in known
    assert not {"tiger", "cup", "a"} & set(known)
    assert known == sorted(known)
    for tokenizer in tokenizers(either):
        ids = tokenizer(" ".join(known[:8])).input_ids[1:-1]
        assert ids == [tokenizer(word).input_ids[1] for word in known[:8]]


def test_a_word_with_the_embedding_of_another_is_encoded_as_the_other(either):
    texts = ["a cat", "a banana", "a photo of a cat"]
    before = encode_prompts(either, texts)
    with replaced_embeddings(either, ["cat"], embeddings(either, ["banana"])):
        inside = encode_prompts(either, texts)
    after = encode_prompts(either, texts)
    expected = encode_prompts(either, ["a banana", "a banana", "a photo of a banana"])
    for name in before:
        assert torch.equal(after[name], before[name])
        torch.testing.assert_close(inside[name], expected[name])


def test_gradients_of_replaced_embeddings_match_finite_differences(either):
    vectors = [table.clone().requires_grad_(True) for table in embeddings(either, ["cat"])]

    def value():
        with replaced_embeddings(either, ["cat"], vectors):
            encoded = encode_prompts(either, ["a photo of a cat"])
        return sum(v.float().pow(2).sum() for v in encoded.values())

    for vector, gradient in zip(vectors, torch.autograd.grad(value(), vectors), strict=True):
        direction, eps = torch.nn.functional.normalize(gradient, dim=-1), 1e-2
        with torch.no_grad():
            vector += eps * direction
            high = value()
            vector -= 2 * eps * direction
            low = value()
            vector += eps * direction
        slope = ((high - low) / (2 * eps)).item()
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=0.05)
