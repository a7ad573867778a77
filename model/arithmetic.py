"""How many multiply-accumulates a denoiser and its halves cost, counted rather than measured."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from encache.model.backbone import backbone_of
from encache.model.spec import NO_CUT, Cut
from encache.model.split import Halves, shapes_alone


@dataclass(frozen=True)
class Arithmetic:
    """GFLOP of one row (one image, one guidance branch, one call); a multiply-add counts as two.

    Convolutions, linear layers and attention are counted; activations and norms are not. Without a
    cut all of it is the encoder's.
    """

    encoder: float
    decoder: float

    @property
    def full(self) -> float:
        """One undivided evaluation."""
        return self.encoder + self.decoder

    def total(self, encoder_rows: int, decoder_rows: int) -> float:
        """GFLOP of so many rows."""
        return encoder_rows * self.encoder + decoder_rows * self.decoder


def count_arithmetic(
    module: Any, cut: Cut, height: int, width: int, text_length: int = 77, num_frames: int = 1
) -> Arithmetic:
    """Count both halves of a diffusers denoiser for latents of height x width, on shapes alone."""
    sizes = {"B": 1, "L": text_length, "F": num_frames, "h": height, "w": width}
    with torch.device("meta"), torch.no_grad():
        alone = type(module).from_config(dict(module.config)).eval()
        backbone = backbone_of(alone)
        latents, timestep, conditions = shapes_alone(backbone, sizes)
        if cut == NO_CUT:
            with FlopCounterMode(display=False) as whole:
                backbone.call(alone, latents, timestep, conditions)
            return Arithmetic(whole.get_total_flops() / 1e9, 0.0)
        halves, weights = Halves(alone, cut), torch.ones(1, 1)
        with FlopCounterMode(display=False) as encoder:
            features = halves.encoder(latents, timestep, conditions)
        with FlopCounterMode(display=False) as decoder:
            halves.decoder([one[None] for one in features], weights, timestep, conditions)
    # The blend is a product in form only: a weighted sum of M tensors, left out like other sums.
    blends = 2 * sum(feature.numel() for feature in features)
    return Arithmetic(encoder.get_total_flops() / 1e9, (decoder.get_total_flops() - blends) / 1e9)
