"""A diffusers UNet cut in two, without touching it.

The encoder runs everything up to the cut, the decoder everything after it. The decoder sees the
latents only through the features, so decoder calls that share features run as one batch.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from encache.errors import CheckpointError
from encache.model.features import Cut, Feature, feature_table, num_up_blocks_cached

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class UNetEncoder(nn.Module):
    """Down blocks, mid block and the up blocks before the cut; all of the UNet if it is "out"."""

    def __init__(self, unet: "UNet2DConditionModel", cut: Cut) -> None:
        super().__init__()
        self.unet = unet
        self.cut = cut
        self.num_up_blocks = num_up_blocks_cached(cut, len(unet.up_blocks))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        added_text: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute the features of one call.

        Args:
            latents: denoiser input [B, 4, h, w].
            timestep: one timestep for the whole batch [1], or one each [B].
            text: text embeddings [B, L, D].
            added_text: SDXL's pooled text embeddings [B, P].
            time_ids: SDXL's sizes and crops [B, 6].

        Returns:
            The features in the order of `feature_table`, each [B, C, h', w'].
        """
        emb = _embed_time(self.unet, timestep.expand(latents.shape[0]), text, added_text, time_ids)
        hidden = self.unet.conv_in(latents)
        skips: tuple[Tensor, ...] = (hidden,)
        for block in self.unet.down_blocks:
            hidden, new = block(hidden, emb, **_attend(block, text))
            skips += new
        if self.unet.mid_block is not None:
            hidden = self.unet.mid_block(hidden, emb, **_attend(self.unet.mid_block, text))
        blocks = self.unet.up_blocks[: self.num_up_blocks]
        hidden, skips = _run_up_blocks(blocks, hidden, skips, emb, text)
        return (_predict(self.unet, hidden),) if self.cut == "out" else (*skips, hidden)


class UNetDecoder(nn.Module):
    """The blend, then the up blocks after the cut and the output convolution, if any are left."""

    def __init__(self, unet: "UNet2DConditionModel", cut: Cut) -> None:
        super().__init__()
        self.unet = unet
        self.cut = cut
        self.num_up_blocks = num_up_blocks_cached(cut, len(unet.up_blocks))

    def forward(
        self,
        features: Sequence[Tensor],
        weights: Tensor,
        timesteps: Tensor,
        text: Tensor,
        added_text: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise of K calls in one batch.

        Args:
            features: the last M key calls' features, each [M, B, C, h', w'].
            weights: the blend [K, M]; call k mixes sum_m weights[k, m] features[m].
            timesteps: the calls' timesteps [K], or one for every row [K, B].
            text: text embeddings [B, L, D].
            added_text: SDXL's pooled text embeddings [B, P].
            time_ids: SDXL's sizes and crops [B, 6].

        Returns:
            Noise predictions [K * B, 4, h, w], call by call.
        """
        num_calls, batch = weights.shape[0], text.shape[0]
        *skips, hidden = (blend(weights, tensor) for tensor in features)
        if self.cut == "out":
            return hidden
        text = text.repeat(num_calls, 1, 1)
        if added_text is not None and time_ids is not None:
            added_text, time_ids = added_text.repeat(num_calls, 1), time_ids.repeat(num_calls, 1)
        timesteps = timesteps if timesteps.ndim == 2 else timesteps[:, None]
        timesteps = timesteps.expand(num_calls, batch).flatten()
        emb = _embed_time(self.unet, timesteps, text, added_text, time_ids)
        blocks = self.unet.up_blocks[self.num_up_blocks :]
        hidden, _ = _run_up_blocks(blocks, hidden, tuple(skips), emb, text)
        return _predict(self.unet, hidden)


class SplitUNet:
    """The two halves of one UNet and the table of what crosses the cut.

    The halves share the UNet's modules; nothing is copied and nothing is set on them.

    Raises:
        CheckpointError: the UNet conditions on something that the halves do not carry.
    """

    def __init__(self, unet: "UNet2DConditionModel", cut: Cut) -> None:
        _refuse_unsupported(unet)
        self.cut = cut
        self.features: tuple[Feature, ...] = feature_table(unet.config, cut)
        self.encoder = UNetEncoder(unet, cut)
        self.decoder = UNetDecoder(unet, cut)


def blend(weights: Tensor, ring: Tensor) -> Tensor:
    """Mix M key calls' features for K calls: [K, M] x [M, B, C, h, w] -> [K * B, C, h, w]."""
    mixed = weights.to(ring.dtype) @ ring.flatten(1)
    return mixed.view(weights.shape[0] * ring.shape[1], *ring.shape[2:])


def _run_up_blocks(
    blocks: Sequence[Any],
    hidden: Tensor,
    skips: tuple[Tensor, ...],
    emb: Tensor,
    text: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run up blocks that take their skips from the end; return the hidden state and the rest.

    Written out, because the blocks' own forward branches on the batch and picture size, which
    would freeze both in an exported graph.
    """
    for block in blocks:
        attentions = getattr(block, "attentions", repeat(None))
        for resnet, attention in zip(block.resnets, attentions, strict=False):
            hidden = resnet(torch.cat([hidden, skips[-1]], dim=1), emb)
            skips = skips[:-1]
            if attention is not None:
                hidden = attention(hidden, encoder_hidden_states=text, return_dict=False)[0]
        for upsampler in block.upsamplers or ():
            # The next skip's size, not a doubling: odd latent sizes were rounded on the way down.
            hidden = upsampler.conv(interpolate(hidden, size=skips[-1].shape[2:], mode="nearest"))
    return hidden, skips


def _predict(unet: "UNet2DConditionModel", hidden: Tensor) -> Tensor:
    """The noise prediction from what the last up block gives."""
    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    return unet.conv_out(hidden)


def _attend(block: nn.Module, text: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


def _embed_time(
    unet: "UNet2DConditionModel",
    timesteps: Tensor,
    text: Tensor,
    added_text: Tensor | None,
    time_ids: Tensor | None,
) -> Tensor:
    """The embedding that every block receives, one row per batch element."""
    emb = unet.time_embedding(unet.get_time_embed(sample=text, timestep=timesteps))
    if unet.config.addition_embed_type is None:
        return emb
    added = {"text_embeds": added_text, "time_ids": time_ids}
    return emb + unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)


def _refuse_unsupported(unet: "UNet2DConditionModel") -> None:
    config = unet.config
    up_blocks = {type(block).__name__ for block in unet.up_blocks}
    unsupported = {
        "more inputs than latents (inpainting, editing)": config.in_channels != config.out_channels,
        "other up blocks than Stable Diffusion's": up_blocks - {"UpBlock2D", "CrossAttnUpBlock2D"},
        "FreeU": any(getattr(block, "s1", None) for block in unet.up_blocks),
        "class conditioning": unet.class_embedding is not None,
        "encoder_hid_proj": unet.encoder_hid_proj is not None,
        f"addition_embed_type {config.addition_embed_type}": config.addition_embed_type
        not in (None, "text_time"),
        "GLIGEN or gated attention": config.attention_type != "default",
        "time_cond_proj_dim (distilled guidance)": config.time_cond_proj_dim is not None,
        "time_embedding_act_fn": unet.time_embed_act is not None,
        "center_input_sample": config.center_input_sample,
    }
    for reason, present in unsupported.items():
        if present:
            raise CheckpointError(
                f"This UNet uses {reason}, which the split does not carry. "
                "Stable Diffusion's text-to-image UNets work."
            )
