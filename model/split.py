"""A denoiser cut in two by its own forward, without touching it.

A shallow copy of the model runs its own forward, and the stages on the other side of the cut are
replaced by stand-ins. The encoder stops after the last stage before the cut; in the decoder the
stages before the cut hand out recorded outputs. The decoder sees the latents only through these, so
decoder calls that share them run as one batch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from encache.errors import CheckpointError
from encache.model.backbone import (
    Backbone,
    Conditions,
    backbone_of,
    refuse_unknown_attention,
)
from encache.model.copies import ChildStandIn, with_children
from encache.model.spec import Cut, Dimension, TensorSpec


class Whole(nn.Module):
    """The undivided denoiser, at any size."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.module = backbone.module
        self._backbone = backbone

    def forward(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """Predict the noise in latents [B, C, h, w] at one timestep [1] or one each [B]."""
        return self._backbone.call(_copy(self._backbone), latents, timestep, conditions)


class _Half(nn.Module):
    """One side of a cut.

    Args:
        backbone: the denoiser.
        stages: its stages before the cut.
        crossing: what crosses it.
    """

    def __init__(self, backbone: Backbone, stages: Sequence[str], crossing: "_Crossing") -> None:
        super().__init__()
        self.module = backbone.module
        self._backbone = backbone
        self._stages = stages
        self._crossing = crossing


class Encoder(_Half):
    """Everything up to the cut."""

    def forward(
        self, latents: Tensor, timestep: Tensor, conditions: Conditions
    ) -> tuple[Tensor, ...]:
        """Compute the features of one call.

        Args:
            latents: denoiser input [B, C, h, w].
            timestep: one timestep for the whole batch [1], or one each [B].
            conditions: see `Backbone`.

        Returns:
            The tensors that cross the cut, as `Halves.features` names them.
        """
        outputs = _record(self._backbone, self._stages, latents, timestep, conditions)
        leaves = tree_leaves(outputs)
        features = [leaves[index] for index in self._crossing.live]
        # Up to here the forward itself has added them; the decoder's is not told of them.
        return tuple(
            feature + conditions[residual] if residual in conditions else feature
            for feature, residual in zip(features, self._crossing.residuals, strict=True)
        )


class Decoder(_Half):
    """The blend, then everything after the cut."""

    def forward(
        self,
        features: Sequence[Tensor],
        weights: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
    ) -> Tensor:
        """Predict the noise of K calls in one batch.

        Args:
            features: the last M key calls' features, each [M, B, ...].
            weights: the blend [K, M]; call k mixes sum_m weights[k, m] features[m].
            timesteps: the calls' timesteps [K], or one for every row [K, B].
            conditions: see `Backbone`; of B rows, which every call repeats. Residuals are already
                in the features.

        Returns:
            Noise predictions [K * B, C, h, w], call by call.
        """
        num_calls, batch = weights.shape[0], features[0].shape[1]
        mixed = [blend(weights, tensor) for tensor in features]
        outputs, sizes = self._crossing.restore(mixed), mixed[0]
        repeated = {
            name: tensor.repeat(num_calls, *[1] * (tensor.ndim - 1))
            for name, tensor in conditions.items()
            if name not in {one.name for one in self._backbone.residuals}
        }
        if "F" in self._backbone.latents.shape:  # then each row is a frame
            batch = next(iter(conditions.values())).shape[0]
            frames = sizes.shape[0] // (num_calls * batch)
            sizes = sizes.unflatten(0, (num_calls * batch, frames)).transpose(1, 2)
        timesteps = timesteps if timesteps.ndim == 2 else timesteps[:, None]
        timesteps = timesteps.expand(num_calls, batch).flatten()
        return _replay(self._backbone, self._stages, outputs, sizes, timesteps, repeated, num_calls)


class Halves:
    """The two halves of one denoiser, and what crosses the cut between them.

    They share the denoiser's modules; nothing is copied and nothing is set on them.

    Args:
        module: a diffusers denoiser.
        cut: where it is cut.

    Raises:
        CheckpointError: no family knows the denoiser or its attention, or it has no such cut.
    """

    def __init__(self, module: Any, cut: Cut) -> None:
        refuse_unknown_attention(module)
        backbone = backbone_of(module)
        stages = backbone.stages_before(cut)
        module_class: Any = type(module)
        crossing = _find_crossing(module_class, module.to_json_string(), cut)
        self.features = crossing.features
        self.encoder = Encoder(backbone, stages, crossing)
        self.decoder = Decoder(backbone, stages, crossing)


def blend(weights: Tensor, ring: Tensor) -> Tensor:
    """Mix M key calls' features for K calls: [K, M] x [M, B, ...] -> [K * B, ...]."""
    mixed = weights.to(ring.dtype) @ ring.flatten(1)
    return mixed.view(weights.shape[0] * ring.shape[1], *ring.shape[2:])


class _Stop(Exception):  # noqa: N818  # nothing went wrong
    """The encoder has what it needs."""


def _copy(backbone: Backbone, children: Mapping[str, Any] | None = None, num_calls: int = 1) -> Any:
    """A shallow copy of the module that runs at any size, with some other children.

    It runs so many calls in one batch.
    """
    replaced = {
        path: ChildStandIn(child := backbone.module.get_submodule(path), partial(function, child))
        for path, function in backbone.replaced.items()
    }
    repeated = backbone.repeated(backbone.module, num_calls)
    copied = with_children(backbone.module, {**replaced, **repeated, **(children or {})})
    copied.__dict__.pop("forward", None)  # what somebody put there would run the original
    for name, value in backbone.fixed.items():
        setattr(copied, name, value)
    return copied


def _record(
    backbone: Backbone,
    stages: Sequence[str],
    latents: Tensor,
    timesteps: Tensor,
    conditions: Conditions,
) -> list[Any]:
    """Run the forward up to the last of the stages; what each of them returned."""
    outputs: list[Any] = []
    whole = _copy(backbone)

    def recording(child: nn.Module) -> ChildStandIn:
        def run(*arguments: Any, **options: Any) -> Any:
            outputs.append(child(*arguments, **options))
            if len(outputs) == len(stages):
                raise _Stop
            return outputs[-1]

        return ChildStandIn(child, run)

    children = {path: recording(whole.get_submodule(path)) for path in stages}
    try:
        backbone.call(with_children(whole, children), latents, timesteps, conditions)
    except _Stop:
        return outputs
    raise AssertionError(f"the forward does not run {stages[len(outputs)]}")


def _replay(
    backbone: Backbone,
    stages: Sequence[str],
    outputs: Sequence[Any],
    latents: Tensor,
    timesteps: Tensor,
    conditions: Conditions,
    num_calls: int = 1,
) -> Tensor:
    """Run the forward with recorded outputs for the stages, for so many calls in one batch.

    Of the latents only the size counts.
    """
    children = {
        path: ChildStandIn(
            backbone.module.get_submodule(path), lambda *_, output=output, **__: output
        )
        for path, output in zip(stages, outputs, strict=True)
    }
    copied = _copy(backbone, children, num_calls)
    return backbone.call(copied, latents, timesteps, conditions)


@dataclass(frozen=True)
class _Crossing:
    """What the stages before a cut return, and which of it the stages behind it read.

    Attributes:
        features: the tensors that are read.
        live: their places among all that the stages return.
        structures: how each stage returns it.
        origins: of each place the feature that is to be handed out; the first stands for what
            nobody reads.
        residuals: name of what may be added to each feature, or an empty one.
    """

    features: tuple[TensorSpec, ...]
    live: tuple[int, ...]
    structures: tuple[TreeSpec, ...]
    origins: tuple[int, ...]
    residuals: tuple[str, ...]

    def restore(self, features: Sequence[Tensor]) -> list[Any]:
        """Outputs of the stages, made of features."""
        leaves = iter([features[index] for index in self.origins])
        return [
            tree_unflatten([next(leaves) for _ in range(one.num_leaves)], one)
            for one in self.structures
        ]


class _Reads(TorchDispatchMode):
    """Notes which tensors any computation takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        self.seen |= {id(one) for one in leaves if isinstance(one, Tensor)}
        return function(*args, **(kwargs or {}))


#: Two sets of sizes by which a free dimension is told from a fixed one and from any other.
_TRIED = (
    {"B": 3, "L": 7, "F": 13, "h": 144, "w": 272},
    {"B": 5, "L": 11, "F": 17, "h": 208, "w": 368},
)


@lru_cache(maxsize=64)
def _find_crossing(module_class: Any, config: str, cut: Cut) -> _Crossing:
    """Run a model of this config on shapes alone, and see what its decoder reads."""
    with torch.device("meta"), torch.no_grad():
        backbone = backbone_of(module_class.from_config(json.loads(config)).eval())
        stages = backbone.stages_before(cut)
        inputs, others = (shapes_alone(backbone, sizes) for sizes in _TRIED)
        outputs, other_outputs = (_record(backbone, stages, *one) for one in (inputs, others))
        with _Reads() as reads:
            _replay(backbone, stages, outputs, *inputs)
    leaves, other_leaves = tree_leaves(outputs), tree_leaves(other_outputs)
    # A stage may return one tensor twice, as hidden state and as skip; its last place counts.
    places = {id(one): place for place, one in enumerate(leaves)}
    distinct = sorted(places.values())
    live = tuple(place for place in distinct if id(leaves[place]) in reads.seen)
    numbers = {place: number for number, place in enumerate(live)}
    residuals = [one.name for one in backbone.residuals]
    residual_of = dict(zip(distinct, residuals, strict=False))
    last = tree_leaves(outputs[-1])
    names = {place: f"skip_{number}" for number, place in enumerate(distinct)}
    if len(last) == 1:
        names[distinct[-1]] = "hidden"
    return _Crossing(
        features=tuple(
            TensorSpec(names[place], _fit(leaves[place].shape, other_leaves[place].shape))
            for place in live
        ),
        live=live,
        structures=tuple(tree_flatten(one)[1] for one in outputs),
        origins=tuple(numbers.get(places[id(one)], 0) for one in leaves),
        residuals=tuple(residual_of.get(place, "") for place in live),
    )


def shapes_alone(
    backbone: Backbone, sizes: Mapping[str, int]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents, timesteps and conditions of these sizes."""
    conditions = {
        one.name: torch.empty(one.size(sizes), dtype=torch.int64 if one.dtype == "int64" else None)
        for one in backbone.conditions
    }
    return torch.empty(backbone.latents.size(sizes)), torch.empty(1), conditions


def _fit(shape: Sequence[int], other: Sequence[int]) -> tuple[Dimension, ...]:
    """The dimensions that have these lengths at the two sizes that were tried."""
    divided = [(name, 2**level) for level, name in product(range(7), ("h", "w"))]
    sides = [name if divisor == 1 else f"{name}/{divisor}" for name, divisor in divided]
    areas = [f"{one}*{two}" for one, two in zip(sides[::2], sides[1::2], strict=True)]
    known = {
        tuple(TensorSpec("", (text,)).size(sizes)[0] for sizes in _TRIED): text
        for text in ("B", "L", "F", "B*F", *areas, *sides)
    }
    fitted: list[Dimension] = []
    for lengths in zip(shape, other, strict=True):
        if lengths[0] != lengths[1] and lengths not in known:
            raise CheckpointError(f"A tensor of {list(shape)} at the cut has a size of its own.")
        fitted.append(lengths[0] if lengths[0] == lengths[1] else known[lengths])
    return tuple(fitted)
