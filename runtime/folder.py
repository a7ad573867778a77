"""An engine folder that runs the denoiser of somebody else's pipeline."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from encache.contract.dtypes import tensor_dtype
from encache.contract.manifest import Manifest, read_manifest
from encache.errors import EngineError
from encache.export.graphs import denoiser_graphs
from encache.model.backbone import Conditions, backbone_of
from encache.model.family import HOSTED
from encache.model.spec import Cut, GraphSpec
from encache.runtime.backends import open_graphs
from encache.runtime.engines import Graph, GraphEngines


def open_folder(
    folder: Path,
    denoiser: Any,
    cut: Cut | None,
    controlled: bool = False,
    across_frames: bool = False,
) -> "FolderEngines":
    """Open the denoiser's engines of a folder, and no more of it.

    Their inputs and outputs must be those of the pipeline's denoiser. Its weights are not compared:
    the engines of another model with the same inputs and features draw that model's pictures.

    Args:
        folder: from `encache-export`.
        denoiser: the pipeline's own.
        cut: the one that was asked for, if any.
        controlled: whether a ControlNet adds to what the denoiser computes.
        across_frames: whether the pipeline lets it attend across frames.

    Raises:
        EncacheError: the folder cannot be opened, or its engines are of another cut or model.
    """
    manifest = read_manifest(folder)
    identity = manifest.identity
    if cut not in (None, identity.cut):
        raise EngineError(
            f"{folder} holds engines of the cut {identity.cut}, not {cut}: leave the cut out, or "
            f"export again with --cut {cut}."
        )
    _refuse_another_pipeline(folder, identity.pipeline, controlled, across_frames)
    graphs_here = denoiser_graphs(denoiser, identity.cut, controlled, identity.frames)
    wanted = tuple(one.spec for one in graphs_here)
    names = [one.name for one in wanted]
    denoising = replace(manifest, graphs=tuple(one for one in manifest.graphs if one.name in names))
    _refuse_another_model(folder, denoising, wanted)
    graphs, device = open_graphs(folder, denoising)
    residuals = [one.name for one in backbone_of(denoiser).residuals]
    return FolderEngines(denoising, graphs, device, residuals)


def _refuse_another_pipeline(
    folder: Path, name: str, controlled: bool, across_frames: bool
) -> None:
    """Refuse a graph that lacks what a pipeline adds to its denoiser, or that has more of it."""
    family = HOSTED.get(name)
    for what, there, here in (
        ("what a ControlNet adds", bool(family and family.controlled), controlled),
        ("attention across frames", bool(family and family.across_frames), across_frames),
    ):
        if there != here:
            raise EngineError(
                f"{folder} holds engines {'with' if there else 'without'} {what}, and this "
                f"pipeline works {'with' if here else 'without'} it: export again, with "
                "--pipeline and the class of this pipeline."
            )


def _refuse_another_model(folder: Path, manifest: Manifest, wanted: Sequence[GraphSpec]) -> None:
    there, here = _tensors(manifest.graphs), _tensors(wanted)
    for name in (*here, *there):
        if there.get(name) != here.get(name):
            raise EngineError(
                f"{folder} holds the engines of another model ({manifest.name}): {name} is "
                f"{there.get(name, 'missing')} there and {here.get(name, 'missing')} in this "
                "pipeline. Export this pipeline's own model."
            )


def _tensors(graphs: Sequence[GraphSpec]) -> dict[str, str]:
    """Shape and precision of what goes into each graph and comes out, by name."""
    return {
        f"{graph.name}'s {one.name}": f"[{', '.join(map(str, one.shape))}]"
        + (f" of {one.dtype}" if one.dtype != "model" else "")
        for graph in graphs
        for one in chain(graph.inputs, graph.outputs)
    }


class FolderEngines(GraphEngines):
    """Engines that take what a pipeline gives: in its precision, on its device.

    Args:
        manifest: of the folder, with the denoiser's graphs alone.
        graphs: these, by name.
        device: where they run.
        residuals: names of what a ControlNet may add, which no decoder is told.
    """

    def __init__(
        self,
        manifest: Manifest,
        graphs: Mapping[str, Graph],
        device: str,
        residuals: Sequence[str] = (),
    ) -> None:
        super().__init__(manifest, graphs, device, capturable=False)
        self._inputs = self.conditions
        self.conditions = tuple(one for one in self._inputs if one.name not in residuals)
        self._downscale = manifest.spec.downscale
        self._latents = manifest.graphs[0].inputs[0]

    def denoise(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        self._refuse_beyond(latents)
        latents, timestep = latents.to(self.device, self.dtype), timestep.to(self.device)
        return super().denoise(latents, timestep, self._known(conditions))

    def encode(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: Conditions,
        ring: Sequence[Tensor],
        slot: int,
    ) -> None:
        self._refuse_beyond(latents)
        latents, timestep = latents.to(self.device, self.dtype), timestep.to(self.device)
        super().encode(latents, timestep, self._known(conditions), ring, slot)

    def decode(
        self, ring: Sequence[Tensor], weights: Tensor, timesteps: Tensor, conditions: Conditions
    ) -> Tensor:
        return super().decode(ring, weights, timesteps.to(self.device), self._known(conditions))

    def _refuse_beyond(self, latents: Tensor) -> None:
        """Raise EngineError for latents [B, ...] of a size that the graphs do not take."""
        kept = self._latents.shape
        sides = zip(kept, latents.shape, strict=True)
        if any(isinstance(one, int) and one != side for one, side in sides):
            raise EngineError(
                f"These engines take latents [{', '.join(map(str, kept))}], not "
                f"{list(latents.shape)}: leave sizes out, or export clips again with another "
                "--num-frames."
            )
        if self.target:
            rows, *_, height, width = latents.shape
            height, width = height * self._downscale, width * self._downscale
            self.target.refuse_beyond(rows=rows, height=height, width=width)

    def _known(self, conditions: Conditions) -> dict[str, Tensor]:
        """The conditions as the engines take them; or raise EngineError for others."""
        known = {one.name: tensor_dtype(one, self.dtype) for one in self._inputs}
        if unknown := sorted(conditions.keys() - known.keys()):
            raise EngineError(
                f"This pipeline also gives its denoiser {', '.join(unknown)}, which these engines "
                "do not take. Leave that out, or enable the pipeline without engines."
            )
        return {name: one.to(self.device, known[name]) for name, one in conditions.items()}
