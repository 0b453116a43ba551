"""Images that the original draws for simulated attackers."""

import torch

from mu.concepts.rehearsal import augment, rehearsal_set


def test_a_rehearsal_set_has_the_prompts_of_the_forget_set_and_is_cached(pipe, tmp_path):
    prompts = ["a cat", "a photo of a cat"]
    one = rehearsal_set(pipe, prompts, 5, steps=2, cache=tmp_path)
    assert one.prompts == prompts
    assert one.prompt.tolist() == [0, 1, 0, 1, 0]
    assert len({tuple(mean.flatten().tolist()) for mean in one.mean}) == 5
    (file,) = tmp_path.glob("rehearsal-*")
    stamp = file.stat().st_mtime_ns
    again = rehearsal_set(pipe, prompts, 5, steps=2, cache=tmp_path)
    assert torch.equal(one.mean, again.mean)
    assert file.stat().st_mtime_ns == stamp
    other = rehearsal_set(pipe, prompts, 5, seed=1, steps=2, cache=tmp_path)
    assert not torch.equal(one.mean, other.mean)


def test_augmented_images_stay_in_range_and_depend_on_the_generator():
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    made = [augment(image, torch.Generator().manual_seed(n)) for n in range(20)]
    assert all(x.shape == image.shape and x.abs().max() <= 1 + 1e-5 for x in made)
    assert torch.equal(made[3], augment(image, torch.Generator().manual_seed(3)))
    assert sum(not torch.equal(x, image) for x in made) > 15
