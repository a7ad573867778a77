"""A pipeline's weights under the names of the original Stable Diffusion checkpoints."""

import re

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_state_dict(pipeline):
    """Tensors of a single-file checkpoint for a pipeline with Stable Diffusion 1.x's blocks."""
    layers = pipeline.unet.config.layers_per_block
    unet = {
        f"model.diffusion_model.{_unet_name(name, layers)}": value.clone()
        for name, value in pipeline.unet.state_dict().items()
    }
    num_levels = len(pipeline.vae.config.block_out_channels)
    vae = {
        f"first_stage_model.{_vae_name(name, num_levels)}": _as_convolution(name, value)
        for name, value in pipeline.vae.state_dict().items()
    }
    # The original checkpoints keep CLIP's own names, with the text_model. that it once had.
    text = {
        "cond_stage_model.transformer.text_model." + name.removeprefix("text_model."): value.clone()
        for name, value in pipeline.text_encoder.state_dict().items()
    }
    return unet | vae | text


def _unet_name(name, layers):
    for ours, theirs in TOP.items():
        if name.startswith(ours + "."):
            return name.replace(ours, theirs)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, index, rest = match.groups()
        place = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{place}.{_inside(kind, rest)}"
    if match := re.match(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
    if match := re.match(r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        level, kind, index, rest = match.groups()
        block = int(level) * (layers + 1) + int(index) + 1
        return f"input_blocks.{block}.{int(kind == 'attentions')}.{_inside(kind, rest)}"
    if match := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(.*)", name):
        block = int(match[1]) * (layers + 1) + layers
        return f"output_blocks.{block}.{1 if match[1] == '0' else 2}.conv.{match[2]}"
    match = re.match(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name)
    level, kind, index, rest = match.groups()
    block = int(level) * (layers + 1) + int(index)
    return f"output_blocks.{block}.{int(kind == 'attentions')}.{_inside(kind, rest)}"


def _inside(kind, rest):
    if kind == "attentions":
        return rest
    part, leaf = rest.rsplit(".", 1)
    return f"{RESNET[part]}.{leaf}"


def _vae_name(name, num_levels):
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    for ours, theirs in (("resnets", "block"), ("upsamplers.0", "upsample")):
        name = re.sub(
            rf"up_blocks\.(\d)\.{ours}",
            lambda match, theirs=theirs: f"up.{num_levels - 1 - int(match[1])}.{theirs}",
            name,
        )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for ours, theirs in {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
    }.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _as_convolution(name, value):
    """The original attends with 1x1 convolutions where diffusers has linear layers."""
    linear = re.search(r"attentions\.0\.to_(q|k|v|out\.0)\.weight", name)
    return value[:, :, None, None].clone() if linear else value.clone()
