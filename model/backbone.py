"""A denoiser as everything else sees it: its stages, its named inputs, and how to call it.

A family of models is one entry in `_FAMILIES`: a function that describes a module of its class.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from encache.errors import CheckpointError
from encache.model.spec import NO_CUT, TensorSpec

#: What a denoiser is told beside latents and timestep, by name, such as {"text": [B, L, D]}.
Conditions = Mapping[str, Tensor]
#: Calls a module on latents [B, ...], timesteps [1] or [B], and conditions; gives its prediction.
Call = Callable[[nn.Module, Tensor, Tensor, Conditions], Tensor]


@dataclass(frozen=True)
class Backbone:
    """One denoiser.

    Attributes:
        module: the diffusers model.
        stages: paths of its children in the order in which its forward runs them.
        cuts: the last stage before each cut, by the cut's name.
        latents: its input.
        conditions: its further inputs.
        prediction: its output.
        call: see `Call`.
        fixed: attributes for copies of the module that must run, and export, at any size.
        replaced: what these copies do in the place of a child, by its path; takes the child first.
    """

    module: Any
    stages: tuple[str, ...]
    cuts: Mapping[str, str]
    latents: TensorSpec
    conditions: tuple[TensorSpec, ...]
    prediction: TensorSpec
    call: Call
    fixed: Mapping[str, Any] = field(default_factory=dict)
    replaced: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def stages_before(self, cut: str) -> tuple[str, ...]:
        """The stages whose outputs are cached at this cut.

        Raises:
            CheckpointError: the model has no such cut.
        """
        if cut not in self.cuts:
            raise CheckpointError(
                f"This model has no cut {cut}. Choose one of {', '.join((NO_CUT, *self.cuts))}."
            )
        return self.stages[: self.stages.index(self.cuts[cut]) + 1]


def backbone_of(module: Any) -> Backbone:
    """Describe a diffusers denoiser.

    Raises:
        CheckpointError: no family knows it, or it needs inputs that its family does not carry.
    """
    name = type(module).__name__
    if name not in _FAMILIES:
        raise CheckpointError(f"encache cannot read a {name}; it knows {', '.join(_FAMILIES)}.")
    return _FAMILIES[name](module)


def _unet(unet: Any) -> Backbone:
    """Stable Diffusion 1.x, 2.x and XL."""
    config = unet.config
    _refuse_other_inputs(unet)
    conditions = [TensorSpec("text", ("B", "L", config.cross_attention_dim))]
    if config.addition_embed_type == "text_time":
        embedded_ids = 6 * config.addition_time_embed_dim
        pooled = config.projection_class_embeddings_input_dim - embedded_ids
        conditions += [
            # In fp32, because sizes beyond 2048 have no place in fp16, and both are joined.
            TensorSpec("pooled_text", ("B", pooled), "float32"),
            TensorSpec("time_ids", ("B", 6), "float32", (0, 1024)),
        ]
    downs = [f"down_blocks.{index}" for index in range(len(unet.down_blocks))]
    ups = [f"up_blocks.{index}" for index in range(len(unet.up_blocks))]
    encoder = ["conv_in", *downs, *(["mid_block"] if unet.mid_block is not None else [])]
    return Backbone(
        module=unet,
        stages=(*encoder, *ups),
        cuts={"mid": encoder[-1], **{f"up{index}": up for index, up in enumerate(ups[:-1])}},
        latents=TensorSpec("latents", ("B", config.in_channels, "h", "w")),
        conditions=tuple(conditions),
        prediction=TensorSpec("noise", ("B", config.out_channels, "h", "w")),
        call=_call_unet,
        # Every up block then takes the next skip's size, which is right for odd latents too; left
        # to itself, the forward asks whether that is needed, and a graph would keep the answer.
        fixed={"num_upsamplers": 30},
        replaced={
            f"{up}.upsamplers.{index}": _upsample
            for up, block in zip(ups, unet.up_blocks, strict=True)
            for index, child in enumerate(block.upsamplers or ())
            if type(child).__name__ == "Upsample2D"
        },
    )


def _upsample(upsampler: Any, hidden: Tensor, size: Any) -> Tensor:
    """What diffusers' Upsample2D does for a given size, without asking about the tensor's."""
    return upsampler.conv(interpolate(hidden, size=size, mode="nearest"))


def _call_unet(unet: Any, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    added = None
    if "time_ids" in conditions:
        added = {
            "text_embeds": conditions["pooled_text"],
            "time_ids": conditions["time_ids"],
        }
    text = conditions["text"]
    return unet(latents, timesteps, text, added_cond_kwargs=added, return_dict=False)[0]


def _refuse_other_inputs(unet: Any) -> None:
    config = unet.config
    unsupported = {
        "more inputs than latents (inpainting, editing)": config.in_channels != config.out_channels,
        "class conditioning": unet.class_embedding is not None,
        "encoder_hid_proj": unet.encoder_hid_proj is not None,
        f"addition_embed_type {config.addition_embed_type}": config.addition_embed_type
        not in (None, "text_time"),
        "GLIGEN or gated attention": config.attention_type != "default",
        "time_cond_proj_dim (distilled guidance)": config.time_cond_proj_dim is not None,
    }
    for reason, present in unsupported.items():
        if present:
            raise CheckpointError(
                f"This UNet uses {reason}, which encache does not carry. "
                "Stable Diffusion's text-to-image UNets work."
            )


#: By the class of the diffusers model.
_FAMILIES: dict[str, Callable[[Any], Backbone]] = {"UNet2DConditionModel": _unet}
