"""What fitted blends would gain for the feature cache: weights per call, and per tensor besides.

    python benchmarks/fit_features.py                   # writes benchmarks/fit_features.json

The rule takes a straight line through the last two key calls, with equal weights for every tensor
that crosses the cut. Here the weights of every call are fitted by least squares to the full
sampler's own features, once for all tensors together (each relative to its size) and once for each
tensor alone. What they gain is measured on prompts and seeds held out.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encache.evaluate.distribution import bootstrap_interval, bootstrap_ratio
from encache.evaluate.fit import Batch
from encache.evaluate.machine import describe_machine
from encache.evaluate.settings import read_prompts
from encache.evaluate.store import Store
from encache.evaluate.trajectories import Trajectories, split_prompts
from encache.files import write_json
from encache.model.backbone import Conditions
from encache.model.checkpoint import default_model, find_checkpoint
from encache.progress import progress
from encache.runtime.engines import Engines, allocate_ring
from encache.runtime.guidance import make_guide
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import Decode, Plan, make_plan
from encache.runtime.sampler import Sampling
from encache.runtime.settings import Policy

FOLDER = Path("runs/fit")
STEPS = 50
CUTS = ("mid", "up2")
STRIDES = (5, 10)
#: By the timestep of a call, weights of the ring's slots for each tensor [T, M].
Blends = Mapping[float, Tensor]


@dataclass
class BlendedEngines:
    """Engines whose decoder is handed features that were blended tensor by tensor."""

    engines: Engines
    blends: Blends

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engines, name)

    def decode(
        self, ring: Sequence[Tensor], weights: Tensor, timesteps: Tensor, conditions: Conditions
    ) -> Tensor:
        """As `Engines.decode`, with other weights than the plan's."""
        table = torch.stack([self.blends[float(one)] for one in timesteps])  # [K, T, M]
        blended = [
            torch.einsum("km,m...->k...", table[:, index], tensor).contiguous()
            for index, tensor in enumerate(ring)
        ]
        return self.engines.decode(blended, torch.eye(len(timesteps)), timesteps, conditions)


def features_of(engines: Engines, latents: Tensor, timestep: Tensor, told: Conditions) -> list:
    """Of latents [n, C, h, w], both branches, by tensor [2 n, ...]."""
    rows = latents.repeat(2, 1, 1, 1)
    ring = allocate_ring(engines, 1, rows.shape)
    engines.encode(rows, timestep, told, ring, 0)
    return [one[0] for one in ring]


def normal_equations(engines: Engines, batches: Sequence[Batch], plan: Plan, stride: int) -> Any:
    """Per call and tensor: Gram matrix [2, 2] of the two key calls' features, and moments [2]."""
    grams: dict[int, Tensor] = {}
    moments: dict[int, Tensor] = {}
    for batch in progress(batches, desc="features"):
        wanted = batch.wanted()
        keys: list[list[Tensor]] = []
        for call, timestep in enumerate(plan.timesteps):
            found = features_of(engines, wanted[call], torch.tensor([timestep]), batch.conditions)
            if call % stride == 0:
                keys = [*keys[-1:], found]
            pairs = [
                torch.stack([one.flatten() for one in tensors])
                for tensors in zip(*keys, strict=True)
            ]
            gram = torch.stack([pair @ pair.T for pair in pairs]).double()
            moment = torch.stack(
                [pair @ one.flatten() for pair, one in zip(pairs, found, strict=True)]
            ).double()
            sizes = torch.stack([one.square().sum() for one in found]).double()[:, None]
            grams[call] = grams.get(call, 0) + gram / sizes[..., None]
            moments[call] = moments.get(call, 0) + moment / sizes
    return grams, moments


def fitted_blends(grams: Any, moments: Any, plan: Plan, stride: int, by_tensor: bool) -> Blends:
    """Least squares over the two key calls before each call; a key call keeps its own features."""
    blends = {}
    for call, timestep in enumerate(plan.timesteps):
        gram, moment = grams[call], moments[call]
        if not by_tensor:
            gram, moment = (one.sum(0, True).expand_as(one) for one in (gram, moment))
        table = torch.zeros(len(gram), plan.num_slots)
        latest = call // stride
        slots = [index % plan.num_slots for index in (latest - 1, latest) if index >= 0]
        weights = torch.linalg.solve(gram + 1e-9 * torch.eye(len(slots)), moment)
        if call % stride == 0:
            weights = torch.zeros_like(weights)
            weights[:, -1] = 1
        table[:, slots] = weights.float()
        blends[float(torch.tensor(timestep))] = table
    return blends


def blends_of(plan: Plan, num_tensors: int) -> Blends:
    """The rule's own."""
    return {
        float(torch.tensor(timestep)): torch.tensor(weights).expand(num_tensors, -1)
        for step in plan.steps
        if isinstance(step, Decode)
        for timestep, weights in zip(step.timesteps, step.weights, strict=True)
    }


def errors(engines: Any, plan: Plan, batches: Sequence[Batch], scale: float) -> Tensor:
    """Relative squared error of the latents of every picture [n]."""
    found = []
    for batch in progress(batches, desc="held out"):
        sampling = Sampling(plan, engines, batch.noise.shape, 2, make_guide(scale))
        drawn = sampling.run(batch.noise, batch.conditions).flatten(1)
        wanted = batch.wanted()[-1].flatten(1)
        found.append((drawn - wanted).square().sum(1) / wanted.square().sum(1))
    return torch.cat(found)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=32)
    parser.add_argument("--num-held-out", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/fit_features.json"))
    options = parser.parse_args()
    checkpoint = find_checkpoint()
    scale = checkpoint.guidance_scale
    whole = EncachePipeline.from_checkpoint(checkpoint, engine_dir=FOLDER / "engines")
    whole.set_progress_bar_config(disable=True)
    trajectories = Trajectories(
        whole, checkpoint.fingerprint, STEPS, scale, Store(FOLDER / "store")
    )
    prompts = read_prompts(default_model() / "prompts.txt")
    pictures, held_out = split_prompts(prompts, options.num_images, options.num_held_out)
    trajectories.draw_missing(pictures, held_out)
    fitted, measured = (
        [trajectories.batch(one, numbers) for numbers in one.batches]
        for one in (pictures, held_out)
    )
    names = [job.prompt for job in held_out.jobs(range(held_out.number))]
    rows = []
    for cut in CUTS:
        engines = EncachePipeline.from_checkpoint(
            checkpoint, cut=cut, engine_dir=FOLDER / "engines"
        ).engines
        for stride in STRIDES:
            plan = make_plan(whole.scheduler, STEPS, Policy(stride, cut=cut))
            equations = normal_equations(engines, fitted, plan, stride)
            choices = {
                "extrapolate": blends_of(plan, len(engines.features)),
                "fitted per call": fitted_blends(*equations, plan, stride, False),
                "fitted per call and tensor": fitted_blends(*equations, plan, stride, True),
            }
            rule = None
            for name, blends in choices.items():
                found = errors(BlendedEngines(engines, blends), plan, measured, scale).numpy()
                rule = found if rule is None else rule
                rows.append(
                    {
                        "cut": cut,
                        "stride": stride,
                        "blend": name,
                        "error": float(found.mean()),
                        "interval": bootstrap_interval(found, names),
                        "to_rule": bootstrap_ratio(found, rule, names),
                    }
                )
                print(rows[-1])
    protocol = {"num_images": options.num_images, "num_held_out": options.num_held_out}
    write_json(options.output, {"machine": describe_machine(), "protocol": protocol, "rows": rows})


if __name__ == "__main__":
    main()
