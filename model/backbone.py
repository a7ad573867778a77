"""A denoiser as everything else sees it: its stages, its named inputs, and how to call it.

A family of models is one entry in `_FAMILIES`: a function that describes a module of its class.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor
from torch.nn.functional import interpolate

from encache.errors import CheckpointError
from encache.model.spec import NO_CUT, TensorSpec

#: What a denoiser is told beside latents and timestep, by name, such as {"text": [B, L, D]}.
Conditions = Mapping[str, Tensor]
#: An argument of a module's forward, or one place in an argument that is a dict or a list.
Place = tuple[str] | tuple[str, str | int]


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
        places: where its forward takes each condition, and each residual.
        residuals: inputs that it can do without: what a ControlNet adds to the tensors that the
            stages return, in their order.
        bound: free sizes, by name, that an exported graph keeps at the model's own.
        fixed: attributes for copies of the module that must run, and export, at any size.
        replaced: what these copies do in the place of a child, by its path; takes the child first.
        repeated: children for a copy that runs one or several calls in one batch, by path; takes
            the module and the number of calls.
    """

    module: Any
    stages: tuple[str, ...]
    cuts: Mapping[str, str]
    latents: TensorSpec
    conditions: tuple[TensorSpec, ...]
    prediction: TensorSpec
    places: Mapping[str, Place]
    residuals: tuple[TensorSpec, ...] = ()
    bound: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    replaced: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    repeated: Callable[[Any, int], Mapping[str, Any]] = lambda module, num_calls: {}

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

    def call(
        self, module: Any, latents: Tensor, timesteps: Tensor, conditions: Conditions
    ) -> Tensor:
        """Call the module, or a copy of it, on latents [B, ...] and timesteps [1] or [B]."""
        arguments: dict[str, Any] = {}
        for name, tensor in conditions.items():
            argument, *key = self.places[name]
            if key:
                arguments.setdefault(argument, {})[key[0]] = tensor
            else:
                arguments[argument] = tensor
        for argument, value in arguments.items():
            if isinstance(value, dict) and 0 in value:
                arguments[argument] = tuple(value.values())
        return module(latents, timesteps, **arguments, return_dict=False)[0]

    def read(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """The conditions among the arguments that somebody gives the module's forward.

        Raises:
            CheckpointError: an argument says something that no condition carries.
        """
        added = {self.places[one.name][0] for one in self.residuals}
        given = sum(place[0] in added for place, _ in _places(arguments))
        if given not in (0, len(self.residuals)):
            raise CheckpointError(
                f"A ControlNet gives {given} residuals to a model that adds {len(self.residuals)}. "
                "It belongs to another model."
            )
        names = {place: name for name, place in self.places.items()}
        found: dict[str, Tensor] = {}
        for place, value in _places(arguments):
            if place in names:
                found[names[place]] = value
            elif value is not None:
                raise CheckpointError(
                    f"{'.'.join(map(str, place))} is given to a {type(self.module).__name__}, and "
                    "encache does not carry it there. Leave it out, or do without the cache."
                )
        return found


def _places(arguments: Mapping[str, Any]) -> Iterable[tuple[Place, Any]]:
    """Every value among arguments, those in dicts and lists one by one."""
    for argument, value in arguments.items():
        if isinstance(value, Mapping):
            yield from (((argument, key), one) for key, one in value.items())
        elif isinstance(value, list | tuple):
            yield from (((argument, key), one) for key, one in enumerate(value))
        elif value is not None:
            yield (argument,), value


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
    """Stable Diffusion 1.x, 2.x and XL, distilled ones, inpainting; DeepFloyd-IF."""
    config = unet.config
    _refuse_other_inputs(unet)
    conditions, places = _text(config)
    if config.addition_embed_type == "text_time":
        # An XL refiner is told an aesthetic score in place of a target size of two numbers; only
        # its sizes tell it from a base model.
        width = config.projection_class_embeddings_input_dim
        step = config.addition_time_embed_dim
        num_ids = 5 if width - 5 * step == config.cross_attention_dim else 6
        conditions += [
            # In fp32, because sizes beyond 2048 have no place in fp16, and both are joined.
            TensorSpec("pooled_text", ("B", width - num_ids * step), "float32"),
            TensorSpec("time_ids", ("B", num_ids), "float32", (0, 1024)),
        ]
        places["pooled_text"] = ("added_cond_kwargs", "text_embeds")
        places["time_ids"] = ("added_cond_kwargs", "time_ids")
    if unet.class_embedding is not None:
        conditions.append(TensorSpec("noise_level", ("B",), "int64", (0, 999)))
        places["noise_level"] = ("class_labels",)
    if config.time_cond_proj_dim is not None:
        conditions.append(TensorSpec("guidance", ("B", config.time_cond_proj_dim)))
        places["guidance"] = ("timestep_cond",)
    stages, cuts = _stages(unet, "conv_in")
    residuals = _residuals(unet)
    return Backbone(
        module=unet,
        stages=stages,
        cuts=cuts,
        latents=TensorSpec("latents", ("B", config.in_channels, "h", "w")),
        conditions=tuple(conditions),
        prediction=TensorSpec("noise", ("B", config.out_channels, "h", "w")),
        places={**places, **_residual_places(residuals)},
        residuals=residuals,
        bound=_bound_sides(unet),
        repeated=partial(_across_frames, _frame_attention(unet)),
        **_at_any_size(unet),
    )


def _video_unet(unet: Any) -> Backbone:
    """VideoFusion: a UNet over clips, whose blocks also look from frame to frame."""
    config = unet.config
    conditions, places = _text(config)
    stages, cuts = _stages(unet, "conv_in", "transformer_in")
    return Backbone(
        module=unet,
        stages=stages,
        cuts=cuts,
        latents=TensorSpec("latents", ("B", config.in_channels, "F", "h", "w")),
        conditions=tuple(conditions),
        prediction=TensorSpec("noise", ("B", config.out_channels, "F", "h", "w")),
        places=places,
        **_at_any_size(unet),
    )


def _dit(transformer: Any) -> Backbone:
    """DiT: a cut is the number of the last block before it, and pictures have the model's size."""
    config = transformer.config
    blocks = [f"transformer_blocks.{index}" for index in range(len(transformer.transformer_blocks))]
    side = config.sample_size
    return Backbone(
        module=transformer,
        stages=("pos_embed", *blocks),
        cuts={str(index): block for index, block in enumerate(blocks[:-1])},
        latents=TensorSpec("latents", ("B", config.in_channels, side, side)),
        conditions=(TensorSpec("label", ("B",), "int64", (0, config.num_embeds_ada_norm)),),
        prediction=TensorSpec("noise", ("B", transformer.out_channels, side, side)),
        places={"label": ("class_labels",)},
    )


def _text(config: Any) -> tuple[list[TensorSpec], dict[str, Place]]:
    """The embedded prompt that a UNet attends to."""
    width = config.get("encoder_hid_dim") or config.cross_attention_dim
    return [TensorSpec("text", ("B", "L", width))], {"text": ("encoder_hidden_states",)}


def _stages(unet: Any, *first: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """A UNet's stages, and its cuts: behind the mid block and behind all up blocks but the last."""
    downs = [f"down_blocks.{index}" for index in range(len(unet.down_blocks))]
    ups = [f"up_blocks.{index}" for index in range(len(unet.up_blocks))]
    encoder = [*first, *downs, *(["mid_block"] if unet.mid_block is not None else [])]
    cuts = {"mid": encoder[-1], **{f"up{index}": up for index, up in enumerate(ups[:-1])}}
    return (*encoder, *ups), cuts


def _residuals(unet: Any) -> tuple[TensorSpec, ...]:
    """What a ControlNet may add: one tensor for each skip, and one for the mid block's output."""
    if unet.mid_block is None:
        return ()
    levels = [(unet.config.block_out_channels[0], 0)]
    for level, block in enumerate(unet.down_blocks):
        channels = block.resnets[-1].out_channels
        levels += [(channels, level)] * len(block.resnets)
        levels += [(channels, level + 1)] * len(block.downsamplers or ())
    names = [*map(str, range(len(levels))), "mid"]
    return tuple(
        TensorSpec(f"residual_{name}", ("B", channels, *_sides(level)))
        for name, (channels, level) in zip(names, [*levels, levels[-1]], strict=True)
    )


def _sides(level: int) -> tuple[str, str]:
    """Height and width of tensors behind so many downsamplers."""
    return ("h", "w") if level == 0 else (f"h/{2**level}", f"w/{2**level}")


def _residual_places(residuals: Sequence[TensorSpec]) -> dict[str, Place]:
    """Where a UNet's forward takes them."""
    if not residuals:
        return {}
    down: dict[str, Place] = {
        one.name: ("down_block_additional_residuals", index)
        for index, one in enumerate(residuals[:-1])
    }
    return {**down, residuals[-1].name: ("mid_block_additional_residual",)}


def _bound_sides(unet: Any) -> dict[str, int]:
    """The sides of latents, where up blocks double theirs and are not told what they should be.

    Those of DeepFloyd-IF; it draws at the sizes that its stages were trained for.
    """
    ups = [child for block in unet.up_blocks for child in block.upsamplers or ()]
    if all(type(child).__name__ == "Upsample2D" for child in ups):
        return {}
    return {"h": unet.config.sample_size, "w": unet.config.sample_size}


def _at_any_size(unet: Any) -> dict[str, Any]:
    """What copies of a UNet need to run, and export, at any size."""
    return {
        # Every up block then takes the next skip's size, which is right for odd latents too; left
        # to itself, the forward asks whether that is needed, and a graph would keep the answer.
        "fixed": {"num_upsamplers": 30},
        "replaced": {
            f"up_blocks.{number}.upsamplers.{index}": _upsample
            for number, block in enumerate(unet.up_blocks)
            for index, child in enumerate(block.upsamplers or ())
            if type(child).__name__ == "Upsample2D"
        },
    }


def _upsample(upsampler: Any, hidden: Tensor, size: Any) -> Tensor:
    """What diffusers' Upsample2D does for a given size, without asking about the tensor's."""
    return upsampler.conv(interpolate(hidden, size=size, mode="nearest"))


def _frame_attention(unet: Any) -> tuple[str, ...]:
    """The paths of attention that looks across the frames of a batch, as Text2Video-Zero's does."""
    return tuple(
        path
        for path, child in unet.named_modules()
        if hasattr(vars(child).get("processor"), "batch_size")
    )


def attend_across_frames(unet: Any) -> None:
    """Let a UNet's attention look across frames, as Text2Video-Zero does for each of its calls.

    A batch is then two clips, without and with the prompt.
    """
    unet.set_attn_processor(_FirstFrameAttention(2))


def _across_frames(paths: Sequence[str], unet: Any, num_calls: int) -> dict[str, Any]:
    """Attention across the frames of a batch, told how many clips there are.

    It divides the rows by that number to find each clip's first frame; the same clip at another
    call is another clip.
    """
    children = {}
    for path in paths:
        children[path] = copied = copy.copy(unet.get_submodule(path))
        copied.processor = _FirstFrameAttention(copied.processor.batch_size * num_calls)
    return children


class _FirstFrameAttention:
    """Attention of every frame to the first one of its clip, for so many clips in a batch.

    diffusers' CrossFrameAttnProcessor lists the frames, and a graph would keep their number.
    """

    def __init__(self, num_clips: int) -> None:
        self.batch_size = num_clips  # as diffusers calls it
        self._attend = AttnProcessor2_0()

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None:
            rows = hidden_states.shape[0]  # len would be kept as a number by a graph
            frames = rows // self.batch_size
            places = torch.arange(rows, device=hidden_states.device)
            encoder_hidden_states = hidden_states[places // frames * frames]
        return self._attend(attention, hidden_states, encoder_hidden_states, attention_mask)


def refuse_unknown_attention(module: Any) -> None:
    """Raise CheckpointError for attention that may look across the rows of a batch.

    Several calls then cannot be one batch. diffusers' own does not, but for perturbed guidance,
    which takes the batch apart, and for Text2Video-Zero's, which families know.
    """
    for processor in getattr(module, "attn_processors", {}).values():
        kind = type(processor)
        known = kind.__module__.startswith("diffusers.") or kind is _FirstFrameAttention
        if not known or "PAG" in kind.__name__:
            raise CheckpointError(
                f"This model's attention is a {kind.__name__}, which may look from row to row of a "
                f"batch, so its calls cannot be batched. The cut {NO_CUT} needs no batch."
            )


def _refuse_other_inputs(unet: Any) -> None:
    config = unet.config
    unsupported = {
        f"class_embed_type {config.class_embed_type}": config.class_embed_type
        not in (None, "timestep"),
        f"encoder_hid_dim_type {config.encoder_hid_dim_type}": config.encoder_hid_dim_type
        not in (None, "text_proj"),
        f"addition_embed_type {config.addition_embed_type}": config.addition_embed_type
        not in (None, "text_time", "text"),
        "GLIGEN or gated attention": config.attention_type != "default",
    }
    for reason, present in unsupported.items():
        if present:
            raise CheckpointError(
                f"This UNet uses {reason}, which encache does not carry. The UNets of Stable "
                "Diffusion, ControlNet and DeepFloyd-IF work."
            )


#: By the class of the diffusers model.
_FAMILIES: dict[str, Callable[[Any], Backbone]] = {
    "UNet2DConditionModel": _unet,
    "UNet3DConditionModel": _video_unet,
    "DiTTransformer2DModel": _dit,
}
