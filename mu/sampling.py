"""Sample images with a pipeline."""

import torch


def images_per_batch(pipe):
    """How many images are drawn together: as many as are 64 of 16 × 16 latents."""
    return max(1, 64 * 16**2 // pipe.unet.config.sample_size**2)


@torch.no_grad()
def draw_images(pipe, conditioning, unconditional, seeds, guidance=5.0, steps=25, batch_size=64):
    """Images (n, 3, height, width) in 0…1, one for each row of `conditioning`, by the pipeline's own sampler.

    `guidance` is the pipeline's: ε(∅) + guidance · [ε(c) − ε(∅)]; 1 is no guidance. Each image starts from its own seed, so that
    it does not depend on the batch. `unconditional` has one row."""
    names = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
    pipe.to(pipe.unet.device)
    images = []
    for index in torch.arange(len(seeds)).split(batch_size):
        embeds = {names[k]: v[index] for k, v in conditioning.items() if k in names}
        embeds |= {
            "negative_" + names[k]: v.expand(len(index), *v.shape[1:])
            for k, v in unconditional.items()
            if k in names
        }
        generators = [torch.Generator().manual_seed(int(seeds[i])) for i in index]
        latents = pipe(
            **embeds,
            generator=generators,
            guidance_scale=guidance,
            num_inference_steps=steps,
            output_type="latent",
        ).images
        decoded = pipe.vae.decode(
            latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        ).sample
        images.append(pipe.image_processor.postprocess(decoded, output_type="pt").float().cpu())
    return torch.cat(images)
