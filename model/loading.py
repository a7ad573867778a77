"""A checkpoint opened as diffusers opens it: all of it, or only what its configs say.

Everything goes through the diffusers pipeline's own constructor, which repairs old configs
(steps_offset, clip_sample, sample_size), so that whoever asks gets the same answer.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encache.errors import CheckpointError
from encache.files import parse_json
from encache.model.checkpoint import MARKS, Checkpoint
from encache.model.family import must_upcast, tokenizer_of
from encache.model.preset import PRESET_KEY
from encache.model.spec import ImageSpec
from encache.model.text import with_length
from encache.model.weights import choose_variant, read_header, reason_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Outline:
    """What a model is before its weights are loaded.

    Attributes:
        scheduler: the model's own, a diffusers scheduler; its preset's where it has one.
        spec: how its pictures and latents relate.
    """

    scheduler: Any
    spec: ImageSpec


def read_outline(checkpoint: Checkpoint) -> Outline:
    """Read a checkpoint's configs, without loading weights.

    Raises:
        CheckpointError: they are damaged, or a single file has no folder that holds them.
    """
    import diffusers

    folder = checkpoint.folder
    if folder is None:
        raise CheckpointError(f"{checkpoint.weights} alone holds no configs: add --base.")
    try:
        scheduler_class = getattr(diffusers, checkpoint.index["scheduler"][1])
        family = checkpoint.family
        if family.hosted:  # whose pipelines repair the same as they are opened
            return _hosted_outline(checkpoint, folder)
        pipeline = getattr(diffusers, family.pipeline)(
            unet=_configured(diffusers.UNet2DConditionModel, folder / "unet"),
            vae=_configured(getattr(diffusers, checkpoint.index["vae"][1]), folder / "vae"),
            scheduler=scheduler_class.from_pretrained(folder, subfolder="scheduler"),
            **dict.fromkeys((*family.text_encoders, *family.tokenizers)),
            **family.loading,
        )
        _set_schedule(pipeline, checkpoint)
        spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
    except CheckpointError:
        raise
    except Exception as error:  # damaged configs surface as any exception of two libraries
        raise CheckpointError(f"{folder} has a damaged config: {reason_of(error)}") from error
    return Outline(pipeline.scheduler, spec)


def _hosted_outline(checkpoint: Checkpoint, folder: Path) -> Outline:
    """The same of a pipeline that keeps its own loop."""
    import diffusers

    def config_of(part: str) -> Any:
        model_class = getattr(diffusers, checkpoint.index[part][1])
        return _configured(model_class, folder / part).config

    family = checkpoint.family
    codec = config_of(family.codec) if family.codec else None
    scheduler_class = getattr(diffusers, checkpoint.index["scheduler"][1])
    scheduler = scheduler_class.from_pretrained(folder, subfolder="scheduler")
    return Outline(scheduler, ImageSpec.of_denoiser(config_of(family.denoiser), codec))


def _configured(model_class: Any, folder: Path) -> Any:
    """Something with the config that this model would have, its defaults included."""
    from diffusers import ConfigMixin

    class Configured(ConfigMixin):
        config_name = "config.json"

    outline = Configured()
    given = parse_json((folder / "config.json").read_bytes())
    outline.register_to_config(**_defaults(model_class) | given)
    return outline


def load_pipeline(
    checkpoint: Checkpoint,
    dtype: "torch.dtype | None" = None,
    device: "torch.device | str" = "cpu",
    **parts: Any,
) -> Any:
    """Load the checkpoint as its family's diffusers pipeline, without safety checker.

    Args:
        checkpoint: from `find_checkpoint`.
        dtype: of the weights; float32 by default.
        device: that will run it.
        parts: of the pipeline, in place of the checkpoint's; None for those that are not needed.

    Raises:
        CheckpointError: the files are damaged or belong to another architecture.
    """
    import torch

    dtype = dtype or torch.float32
    _hide_progress_bars()
    pipeline = _load(checkpoint, dtype, parts)
    _set_schedule(pipeline, checkpoint)
    for text_encoder in checkpoint.family.text_encoders:
        tokenizer, module = tokenizer_of(text_encoder), getattr(pipeline, text_encoder)
        if hasattr(getattr(module, "config", None), "max_position_embeddings"):  # T5 has none
            setattr(pipeline, tokenizer, with_length(getattr(pipeline, tokenizer), module))
    if checkpoint.weights and checkpoint.holds == "unet":
        pipeline.unet.load_state_dict(unet_weights(checkpoint, pipeline.unet))
    for edit in checkpoint.edits:
        edit.apply(pipeline)
    codec = getattr(pipeline, checkpoint.family.codec, None)
    if dtype == torch.float16 and codec and must_upcast(checkpoint.family, codec):
        pipeline.vae.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if torch.device(device).type != "cpu":  # there it is, and diffusers would warn of fp16
        pipeline.to(device)
    if torch.device(device).type == "cuda":
        # As its convolutions read them; on a CPU they are a quarter slower that way.
        for module in filter(None, (getattr(pipeline, checkpoint.family.denoiser), codec)):
            if not checkpoint.family.frames:  # a clip has one dimension more
                module.to(memory_format=torch.channels_last)
    return pipeline


def _load(checkpoint: Checkpoint, dtype: "torch.dtype", parts: Mapping[str, Any]) -> Any:
    """The folder's pipeline, or the single file's, completed by its folder."""
    import diffusers

    pipeline_class = getattr(diffusers, checkpoint.family.pipeline)
    single_file = checkpoint.weights is not None and checkpoint.holds == "pipeline"
    folder = str(checkpoint.folder) if checkpoint.folder else None
    options: dict[str, Any] = {
        "dtype": dtype,
        # Without what pictures do not need, and what perhaps cannot even be loaded.
        **checkpoint.family.loading,
        **parts,
        "use_safetensors": True,
    }
    try:
        if single_file:
            options |= _parts_of_the_folder(checkpoint, dtype)
            return pipeline_class.from_single_file(
                str(checkpoint.weights), config=folder, **options
            )
        return pipeline_class.from_pretrained(
            folder, local_files_only=True, variant=checkpoint.variant or None, **options
        )
    except Exception as error:  # damaged files surface as any exception of four libraries
        what = checkpoint.weights if single_file else checkpoint.folder
        hint = " If it is not complete, add --base." if single_file and not folder else ""
        raise CheckpointError(
            f"{what} could not be loaded as {checkpoint.family.title}: {reason_of(error)}{hint}"
        ) from error


def _parts_of_the_folder(checkpoint: Checkpoint, dtype: "torch.dtype") -> dict[str, Any]:
    """What a single file lacks, as pruned ones often do, from the folder that completes it."""
    import diffusers
    import transformers

    assert checkpoint.weights
    if checkpoint.folder is None:
        return {}
    names, _ = read_header(checkpoint.weights)
    parts: dict[str, Any] = {}
    for part, prefix in checkpoint.family.single_file.items():
        if not any(name.startswith(prefix) for name in names):
            folder = checkpoint.folder / part
            library, class_name = checkpoint.index[part]
            model_class = getattr(diffusers if library == "diffusers" else transformers, class_name)
            variant = choose_variant([folder], checkpoint.variant) or None
            parts[part] = model_class.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, variant=variant
            )
    return parts


def scheduler_from_config(config: Any) -> Any:
    """The diffusers scheduler that a config, which may be anybody's, describes with all it needs.

    Raises:
        ValueError: it does not describe one.
    """
    import diffusers

    try:
        scheduler_class: Any = getattr(diffusers, config["_class_name"])
    except (KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ValueError(reason_of(error)) from error
    if not (
        isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)
    ):
        raise ValueError(f"{config['_class_name']} is no scheduler")
    try:
        return scheduler_class.from_config(config)  # type: ignore[attr-defined]
    except Exception as error:  # a constructor meets whatever the config holds
        raise ValueError(reason_of(error)) from error


def _own_scheduler(pipeline: Any, checkpoint: Checkpoint) -> Any:
    """The one that the weights were trained for, or else the folder's."""
    if checkpoint.preset.scheduler is None:
        return pipeline.scheduler
    try:
        return scheduler_from_config(checkpoint.preset.scheduler)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.weights} names no diffusers scheduler in its header ({PRESET_KEY}: "
            f"{error}). Fetch the file again, or write it without that key."
        ) from error


def _set_schedule(pipeline: Any, checkpoint: Checkpoint) -> None:
    """Let the scheduler hold what was repaired, and what the weights' own file says of them."""
    changes: dict[str, Any] = {}
    if checkpoint.prediction:
        changes["prediction_type"] = checkpoint.prediction
    if checkpoint.zero_snr:
        # Its first timestep must be the last one of the training (arXiv 2305.08891).
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = _own_scheduler(pipeline, checkpoint)
    defaults = _defaults(type(scheduler))
    if unknown := sorted(changes.keys() - defaults.keys()):
        remedy = "give a --base whose scheduler is a DDIMScheduler"
        if checkpoint.preset.scheduler:
            remedy = f"name another in its header ({PRESET_KEY})"
        what = f"predicts {checkpoint.prediction}"
        if checkpoint.zero_snr:
            what = "was trained on a schedule that ends without signal (ztsnr)"
        raise CheckpointError(
            f"{checkpoint.weights} {what}, and {type(scheduler).__name__} knows no {unknown[0]}: "
            f"{remedy}."
        )
    # What a config left out is left out again when another solver takes it over, and gets that
    # one's default; but what was repaired since is no default any more.
    left_out = [
        name
        for name in scheduler.config.get("_use_default_values", ())
        if scheduler.config[name] == defaults[name]
    ]
    config = {**scheduler.config, "_use_default_values": left_out}
    pipeline.scheduler = type(scheduler).from_config(config, **changes)


def _defaults(diffusers_class: Any) -> dict[str, Any]:
    """The config that this class has by default."""
    options = inspect.signature(diffusers_class.__init__).parameters
    return {name: option.default for name, option in options.items() if name != "self"}


def _hide_progress_bars() -> None:
    """Loading takes a second; three nested bars per model say nothing."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def unet_weights(checkpoint: Checkpoint, unet: "torch.nn.Module") -> "dict[str, torch.Tensor]":
    """The weights of a checkpoint that holds a UNet alone, which fit this one.

    Raises:
        CheckpointError: they are of another architecture.
    """
    from safetensors.torch import load_file

    assert checkpoint.weights
    new, old = load_file(checkpoint.weights), unet.state_dict()
    for mark in MARKS:
        new.pop(mark, None)
    wrong = sorted(
        name
        for name in new.keys() | old.keys()
        if name not in new or name not in old or new[name].shape != old[name].shape
    )
    if wrong:
        raise CheckpointError(
            f"{checkpoint.weights} is a UNet of another architecture than {checkpoint.folder}: "
            f"{len(wrong)} tensors differ, the first is {wrong[0]}. Give its own base with --base."
        )
    return new
