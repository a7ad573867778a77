"""A plan as one differentiable function of the UNet's weights.

The decoder calls that share an encoder run are one batch, and the solver is a table. So a sampler
with one encoder run is one run of the encoder, one of the decoder and one small matrix product,
from noise to picture.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from encache.model.backbone import Conditions
from encache.model.split import Halves
from encache.runtime.plan import Evaluate, Plan, Row


def compose(
    plan: Plan, halves: Halves, noise: Tensor, conditions: Conditions, recompute: bool = False
) -> Tensor:
    """Run a plan for a cut without guidance, as one differentiable function of the weights.

    Args:
        plan: what to run.
        halves: the denoiser in two, at any cut.
        noise: z [B, C, h, w].
        conditions: of B rows each.
        recompute: keep no activations inside the halves.

    Returns:
        The plan's whole history (z, eps_0, ..., eps_{N-1}) [N + 1, B, C, h, w], float32; a row of
        `plan.samples` over it gives latents.
    """
    run = runner(recompute)
    dtype = halves.encoder.module.dtype
    history = noise[None]
    ring: list[tuple[Tensor, ...]] = [()] * plan.num_slots
    for step in plan.steps:
        if isinstance(step, Evaluate):
            assert step.slot is not None  # the plan is for a cut
            latents = latents_of(step.row, history).to(dtype)
            timestep = noise.new_tensor([step.timestep])
            ring[step.slot] = run(halves.encoder, latents, timestep, conditions)
        else:
            filled = next(features for features in ring if features)
            slots = [features or filled for features in ring]  # what is not filled yet weighs 0
            features = [torch.stack(tensors) for tensors in zip(*slots, strict=True)]
            weights, timesteps = noise.new_tensor(step.weights), noise.new_tensor(step.timesteps)
            predicted = run(halves.decoder, features, weights, timesteps, conditions)
            history = torch.cat([history, predicted.float().view(-1, *noise.shape)])
    return history


def latents_of(row: Row, history: Tensor) -> Tensor:
    """Combine the history [K, B, C, h, w] by the first K of a row's coefficients."""
    # Not as a matrix product, which mixed precision would round.
    coefficients = history.new_tensor(row[: len(history)]).view(-1, 1, 1, 1, 1)
    return (coefficients * history).sum(0)


def runner(recompute: bool) -> Callable[..., Any]:
    """Runs a half of a denoiser; `recompute` keeps no activations and runs it again backwards."""
    if not recompute:
        return lambda half, *arguments: half(*arguments)
    return partial(checkpoint, use_reentrant=False)


def relative_error(latents: Tensor, wanted: Tensor) -> Tensor:
    """||x - r||^2 / ||r||^2 of every picture: [B, ...] -> [B]."""
    difference = (latents - wanted).flatten(1).square().sum(1)
    return difference / wanted.flatten(1).square().sum(1)
