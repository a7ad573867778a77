"""A pipeline's weights under the names of the original Stable Diffusion checkpoints."""

import re

import torch

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
    # Stable Diffusion XL's.
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
#: CLIP's names in open_clip, which trained XL's second text encoder.
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def original_state_dict(pipeline):
    """Tensors of a single-file checkpoint for a pipeline with Stable Diffusion's blocks."""
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
    second = getattr(pipeline, "text_encoder_2", None)
    place = "conditioner.embedders.0" if second else "cond_stage_model"
    text = {
        f"{place}.transformer.text_model." + name.removeprefix("text_model."): value.clone()
        for name, value in pipeline.text_encoder.state_dict().items()
    }
    return unet | vae | text | (_open_clip(second.state_dict()) if second else {})


def _open_clip(state):
    """XL's second text encoder, whose attention has its three projections in one tensor."""
    tensors = {}
    for name, value in state.items():
        ours = name.removeprefix("text_model.")
        if ".k_proj." in ours or ".v_proj." in ours:
            continue
        if ".q_proj." in ours:
            parts = [state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            ours = re.sub(r"self_attn\.q_proj\.(\w+)", r"attn.in_proj_\1", ours)
            value = torch.cat(parts)
        if ours == "text_projection.weight":
            ours, value = "text_projection", value.T
        for hers, theirs in OPEN_CLIP.items():
            ours = ours.replace(hers, theirs)
        tensors[f"conditioner.embedders.1.model.{ours}"] = value.clone().contiguous()
    return tensors


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
