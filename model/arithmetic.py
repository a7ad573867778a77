"""How many multiply-accumulates a UNet and its halves cost, counted rather than measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from encache.model.features import Cut
from encache.model.split import SplitUNet


@dataclass(frozen=True)
class Arithmetic:
    """GFLOP of one row (one image, one guidance branch, one call); a multiply-add counts as two.

    Convolutions, linear layers and attention are counted; activations and norms are not.
    """

    encoder: float
    decoder: float

    @property
    def full(self) -> float:
        """One undivided UNet evaluation."""
        return self.encoder + self.decoder

    def total(self, num_encoder_runs: int, num_calls: int) -> float:
        """GFLOP of one row over a whole sampling run."""
        return num_encoder_runs * self.encoder + num_calls * self.decoder


def count_arithmetic(
    unet_config: Mapping[str, Any], cut: Cut, height: int, width: int, text_length: int = 77
) -> Arithmetic:
    """Count both halves for latents of height x width, on shapes alone."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(unet_config)).eval()
        split = SplitUNet(unet, cut)
        latents = torch.empty(1, unet.config.in_channels, height, width)
        text = torch.empty(1, text_length, unet.config.cross_attention_dim)
        timestep, weights = torch.empty(1), torch.ones(1, 1)
        with torch.no_grad(), FlopCounterMode(display=False) as encoder:
            features = split.encoder(latents, timestep, text)
        with torch.no_grad(), FlopCounterMode(display=False) as decoder:
            split.decoder([one[None] for one in features], weights, timestep, text)
    # The blend is a product in form only: a weighted sum of M tensors, left out like other sums.
    blends = 2 * sum(feature.numel() for feature in features)
    return Arithmetic(encoder.get_total_flops() / 1e9, (decoder.get_total_flops() - blends) / 1e9)
