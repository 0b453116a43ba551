"""Reference implementations in plain torch and diffusers: losses, ESD, SDD, the objective."""

from types import SimpleNamespace

import tiny
import torch

from mu.losses import draw_minibatch
from mu.trainable import trainable


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unet_inputs(batch):
    """Return latents, timesteps and prompt embeddings of a minibatch."""
    latents, timesteps, conditioning = batch.inputs
    return latents, timesteps, conditioning["encoder_hidden_states"]


def denoising_loss(unet, batch):
    return (unet(*unet_inputs(batch)).sample - batch.target).pow(2).mean()


def shifted_frozen():
    """Return a frozen UNet other than the start, so that retention has a gradient at once."""
    unet, g = tiny.make_unet(), generator(5)
    with torch.no_grad():
        for p in unet.parameters():
            p += 0.02 * torch.randn(p.shape, generator=g)
    return tiny.frozen(unet)


def predict_pair(unet, latents, t, empty, prompted):
    """Return the predictions with the empty and with the concept's prompt, from one pass."""
    t = torch.cat([t, t]) if t.ndim else t
    return unet(torch.cat([latents, latents]), t, torch.cat([empty, prompted])).sample.chunk(2)


def plain_esd(sets, steps, seed, lr, eta, guidance):
    """Return the weights after ESD-u, with 4 noisy latents per step."""
    n, forget = 4, sets[0]
    empty = sets[3]["encoder_hidden_states"].expand(n, -1, -1)
    unet, unet_frozen = tiny.make_unet(), tiny.frozen(tiny.make_unet())
    parameters = list(trainable(unet, "u").values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4, fused=True)
    scheduler, g = tiny.make_scheduler(), generator(1000 * seed)
    scheduler.set_timesteps(50)
    for _ in range(steps):
        prompt = torch.randint(len(forget.prompts), (n,), generator=g)
        c = forget.conditioning["encoder_hidden_states"][prompt]
        stop = torch.randint(50, (n,), generator=g)
        latents = torch.randn(n, 4, 8, 8, generator=g)
        z = latents.clone()
        with torch.no_grad():
            for i, t in enumerate(scheduler.timesteps[: stop.max()]):
                without, full = predict_pair(unet, latents, t, empty, c)
                guided = without + guidance * (full - without)
                latents = scheduler.step(guided, t, latents).prev_sample
                z[stop == i + 1] = latents[stop == i + 1]
            t = scheduler.timesteps[stop] + torch.randint(20, (n,), generator=g)
            t = t.clamp(max=999)
            without, full = predict_pair(unet_frozen, z, t, empty, c)
            target = without - eta * (full - without)
        optimizer.zero_grad()
        (unet(z, t, c).sample - target).pow(2).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return tiny.weights(unet)


def plain_sdd(sets, steps, seed, n, grid, decay, lr, guidance):
    """Return losses, trained weights by name, and the averaged UNet, after SDD by SGD."""
    forget, empty = sets[0], sets[3]["encoder_hidden_states"]
    student, teacher = tiny.make_unet(), tiny.frozen(tiny.make_unet())
    trained = {name: p for name, p in student.named_parameters() if "attn2" in name}
    scheduler, g, losses = tiny.make_scheduler(), generator(1000 * seed), []
    scheduler.set_timesteps(grid)
    for _ in range(steps):
        prompt = torch.randint(len(forget.prompts), (n,), generator=g)
        c = forget.conditioning["encoder_hidden_states"][prompt]
        stop = torch.randint(grid, (1, n), generator=g)[0]
        z = torch.randn(n, 4, 8, 8, generator=g)
        t = scheduler.timesteps[stop] + torch.randint(1000 // grid, (n,), generator=g)
        with torch.no_grad():
            for row in range(n):
                z[row] = guided_ddim(
                    teacher, scheduler, z[[row]], int(stop[row]), (empty, c[[row]]), guidance
                )
            target = student(z, t, empty.expand(n, -1, -1)).sample
        loss = (student(z, t, c).sample - target).pow(2).mean()
        losses.append(loss.item())
        found = torch.autograd.grad(loss, list(trained.values()))
        for p, gradient in zip(trained.values(), found, strict=True):
            p.data -= lr * gradient
        weights = dict(student.named_parameters())
        for name, average in teacher.named_parameters():
            average.data.lerp_(weights[name].data, 1 - decay)
    return losses, trained, teacher


def guided_ddim(unet, scheduler, latent, steps, prompts, guidance):
    """Return a latent after the first steps of guided DDIM. prompts: empty, the concept's."""
    for t in scheduler.timesteps[:steps]:
        without, full = (unet(latent, t, prompt).sample for prompt in prompts)
        latent = scheduler.step(without + guidance * (full - without), t, latent).prev_sample
    return latent


class Reference:
    """The terms of the documented objective at the first weights θ, one pass per loss."""

    def __init__(self, sets, seed, timestep):
        self.sets = dict(zip(("forget", "related", "unrelated"), sets[:3], strict=True))
        self.empty = sets[3]["encoder_hidden_states"]
        self.unet, self.unet_frozen = tiny.make_unet(), shifted_frozen()
        self.theta = trainable(self.unet, "u")
        self.g_retain, self.g_meta = generator(1000 * seed + 1), generator(1000 * seed + 2)
        self.timestep = timestep

    def draw(self, name, g):
        return draw_minibatch(self.sets[name], tiny.make_scheduler(), 5, g, self.timestep)

    def predict(self, weights, inputs):
        return torch.func.functional_call(self.unet, weights, inputs).sample

    def loss(self, batch, weights):
        return (self.predict(weights, unet_inputs(batch)) - batch.target).pow(2).mean()

    def esd(self, trajectory, eta):
        z, t, prompt = trajectory
        c = self.sets["forget"].conditioning["encoder_hidden_states"][prompt]
        with torch.no_grad():
            without = self.unet_frozen(z, t, self.empty.expand(len(z), -1, -1)).sample
            target = without - eta * (self.unet_frozen(z, t, c).sample - without)
        return (self.predict(self.theta, (z, t, c)) - target).pow(2).mean()

    def drift(self, inputs):
        with torch.no_grad():
            target = self.unet_frozen(*inputs).sample
        return (self.predict(self.theta, inputs) - target).pow(2).mean()

    def retention(self, related, unrelated, drift_terms, retain_prompts):
        """Return the sum of all drifts; `retain_prompts` are drawn anew."""
        z, t, _ = unet_inputs(unrelated)
        inputs = {
            "related": unet_inputs(related),
            "unrelated": unet_inputs(unrelated),
            "empty": (z[::2], t[::2], self.empty.expand(3, -1, -1)),
        }
        if retain_prompts:
            index = torch.randint(4, (3,), generator=self.g_retain)
            inputs["any"] = (z[::2], t[::2], retain_prompts["encoder_hidden_states"][index])
        return sum(self.drift(rows) for name, rows in inputs.items() if name in drift_terms)

    def fine_tuned(self, name, steps, lr, order):
        """Return θ after SGD on a set, differentiable in θ with order "second"."""
        weights, exact = dict(self.theta), order == "second"
        for _ in range(steps):
            loss = self.loss(self.draw(name, self.g_meta), weights)
            found = torch.autograd.grad(loss, list(weights.values()), create_graph=exact)
            pairs = zip(weights.items(), found, strict=True)
            weights = {n: p - lr * (g if exact else g.detach()) for (n, p), g in pairs}
        return weights

    def bracket(self, batch, fine_tuned):
        return self.loss(batch, fine_tuned) - self.loss(batch, self.theta)

    def controls(self, gradient_norm, alignment):
        def gradient(name):
            loss = self.loss(self.draw(name, self.g_meta), self.theta)
            found = torch.autograd.grad(loss, list(self.theta.values()), create_graph=True)
            return torch.cat([g.flatten() for g in found])

        one, other = gradient("forget"), gradient("related")
        return gradient_norm * one @ one + alignment * one @ other


def objective_gradient(sets, seed, step, trajectory, **options):
    """Return the gradient of the documented objective at θ by name, from its written-out terms."""
    o = SimpleNamespace(**options)
    r = Reference(sets, seed, o.timestep)
    related, unrelated = r.draw("related", r.g_retain), r.draw("unrelated", r.g_retain)
    total = o.unlearn * r.esd(trajectory, o.eta)
    drifts = r.retention(related, unrelated, o.drift_terms, o.retain_prompts)
    total = total + o.retain / 3 * drifts
    total = total + o.learn_related * r.loss(related, r.theta)
    total = total + o.learn_unrelated * r.loss(unrelated, r.theta)
    if o.ascent:
        forget = r.loss(r.draw("forget", r.g_meta), r.theta)
        total = total - o.ascent * min(forget, torch.tensor(o.ascent_bound))
    clean = o.clean and step % 3 == 2
    attacked = "unrelated" if clean else "forget"
    fine_tuned = r.fine_tuned(attacked, o.inner_steps, o.inner_lr, o.order)
    forget = r.draw("forget", r.g_meta)
    if clean:
        brackets = r.bracket(related, fine_tuned) + r.bracket(unrelated, fine_tuned)
        total = total + o.clean * 0.5 * brackets
    else:
        total = total - o.relearn * r.loss(forget, fine_tuned)
        total = total - o.self_destruct * r.bracket(related, fine_tuned)
        total = total + o.keep * r.loss(unrelated, fine_tuned)
    if o.gradient_norm or o.alignment:
        total = total + r.controls(o.gradient_norm, o.alignment)
    found = torch.autograd.grad(total, list(r.theta.values()))
    return dict(zip(r.theta, found, strict=True))
