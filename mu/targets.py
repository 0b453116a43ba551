"""Targets of the loop's own losses: ESD and SDD."""

import contextlib
from dataclasses import dataclass

from mu.losses import predictions
from mu.sampling import Trajectory


@dataclass(frozen=True)
class ESD:
    """Erased stable diffusion (Gandikota et al. 2023); trajectories are sampled by the student."""

    eta: float = 1.0  # strength η
    batch_size: int = 4  # noisy latents per step
    trajectory: Trajectory = Trajectory()

    def sampler(self, state):
        """Return a context with the UNet that samples the trajectories."""
        return contextlib.nullcontext(state.unet)

    def asked(self, draws):
        """Return the inputs for which the target needs the frozen UNet."""
        return {"no concept": draws.no_concept, "concept": draws.concept}

    def target(self, frozen, unet, draws, runtime):
        """Return ε_0(z_t, ∅) − η [ε_0(z_t, c) − ε_0(z_t, ∅)]."""
        empty, full = frozen["no concept"], frozen["concept"]
        return empty - self.eta * (full - empty)


@dataclass(frozen=True)
class SDD:
    """Safe self-distillation (Kim et al. 2023); the running average of the weights samples."""

    batch_size: int = 4
    trajectory: Trajectory = Trajectory()

    def sampler(self, state):
        """Return a context with the UNet that samples the trajectories."""
        return state.averaged()

    def asked(self, draws):
        """Return no inputs: the target needs no frozen UNet."""
        return {}

    def target(self, frozen, unet, draws, runtime):
        """Return ε_θ(z_t, ∅) without gradient: one more pass."""
        return predictions(unet, [draws.no_concept], runtime.accumulation)[0]
