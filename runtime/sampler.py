"""The sampling loop: execute a plan over an engine pair."""

from collections.abc import Callable

import torch
from torch import Tensor

from encache.runtime.engines import Engines, allocate_ring
from encache.runtime.plan import Decode, Encode, Plan

#: Combines noise [K, G, n, 4, h, w] over the guidance axis G into [K, n, 4, h, w].
Guide = Callable[[Tensor], Tensor]
#: Called after each run of the decoder with the calls it covered and a way to their latents.
OnDecoded = Callable[[Decode, Callable[[int], Tensor]], None]


@torch.inference_mode()
def sample(
    plan: Plan,
    engines: Engines,
    noise: Tensor,
    text: Tensor,
    guide: Guide,
    on_decoded: OnDecoded | None = None,
) -> Tensor:
    """Turn unit noise into latents.

    Args:
        plan: what to run, in which order, with which numbers.
        engines: the engine pair that runs it.
        noise: z, one per image [n, 4, h, w], float32.
        text: text embeddings [G * n, L, D]; G is 2 with guidance (negative first), 1 without.
        guide: see `Guide`.
        on_decoded: for progress and callbacks; it may raise to stop.

    Returns:
        Latents [n, 4, h, w], float32.
    """
    num_images, *shape = noise.shape
    num_guided = len(text) // num_images
    ring = allocate_ring(engines, plan.num_slots, len(text), *shape[1:])
    # The history (z, eps_0, ..., eps_{N-1}); the plan's rows are coefficients over it.
    history = noise.new_zeros(plan.num_calls + 1, *noise.shape)
    history[0] = noise
    samples = noise.new_tensor(plan.samples)

    def latents_before(call: int) -> Tensor:
        return torch.tensordot(samples[call, : call + 1], history[: call + 1], 1)

    for step in plan.steps:
        if isinstance(step, Encode):
            row = noise.new_tensor(step.row[: step.call + 1])
            latents = torch.tensordot(row, history[: step.call + 1], 1).to(engines.dtype)
            latents = latents.repeat(num_guided, 1, 1, 1)
            timestep = noise.new_tensor([step.timestep])
            engines.encode(latents, timestep, text, ring, step.slot)
        else:
            weights, timesteps = noise.new_tensor(step.weights), noise.new_tensor(step.timesteps)
            predicted = engines.decode(ring, weights, timesteps, text)
            predicted = predicted.view(len(timesteps), num_guided, *noise.shape)
            history[step.start + 1 : step.stop + 1] = guide(predicted)
            if on_decoded:
                on_decoded(step, latents_before)
    return latents_before(plan.num_calls)
