"""From what a user has on disk to a diffusers pipeline; nothing in a checkpoint is executed.

Finding and fingerprinting a checkpoint needs no torch, so a finished export is recognised at once.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from encache.errors import CheckpointError
from encache.model.features import ImageSpec
from encache.model.lora import Lora, find_lora, fuse
from encache.model.vae import check_vae, replace_vae
from encache.model.weights import (
    read_header,
    reason_of,
    refuse_pickle,
    refuse_without_safetensors,
)

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
#: The parts of a diffusers folder that reach an image; a safety checker does not.
_PARTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae")


#: The name by which a UNet's header refers to the model that ships with encache.
DEFAULT_MODEL_NAME = "encache/emoji"


def default_model() -> Path:
    """Folder of the model that ships with encache: 64x64 emoji."""
    return Path(str(files("encache.model"))) / "emoji"


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder, or a safetensors file with the folder that completes it.

    Attributes:
        folder: diffusers folder; None for a single-file checkpoint without one.
        weights: safetensors file whose tensors replace those of the folder.
        holds: "pipeline" for a single-file Stable Diffusion, "unet" for UNet weights alone.
        loras: fused into the weights, in this order.
        vae: folder of an autoencoder that replaces the model's own.
    """

    folder: Path | None
    weights: Path | None = None
    holds: str = "pipeline"
    loras: tuple[Lora, ...] = ()
    vae: Path | None = None

    @property
    def name(self) -> str:
        """Short name for folders and reports."""
        if self.weights:
            model = self.weights.stem
        else:
            assert self.folder is not None
            model = _folder_name(self.folder)
        changes = [lora.path.stem for lora in self.loras]
        changes += [_folder_name(self.vae)] if self.vae else []
        return "+".join((model, *changes))

    @property
    def base_name(self) -> str | None:
        """What completes UNet weights made from this checkpoint.

        None for a single file, whose own autoencoder and text encoder lie in no folder.
        """
        if self.folder is None or (self.weights and self.holds == "pipeline"):
            return None
        if self.folder == default_model():
            return DEFAULT_MODEL_NAME
        return _hub_id(self.folder) or str(self.folder.resolve())

    def files(self) -> Iterator[Path]:
        """Every file of the model that determines an image, in a stable order."""
        parts = {part: self.folder / part for part in _PARTS} if self.folder else {}
        if self.vae:
            parts["vae"] = self.vae
        for path in parts.values():
            inside = sorted(path.rglob("*")) if path.is_dir() else [path]
            yield from (file for file in inside if file.suffix in {".json", ".txt"})
            yield from (file for file in inside if _is_loaded(file))
        if self.weights:
            yield self.weights

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the files' contents and names: equal for equal models, wherever."""
        total = hashlib.sha256()
        for file in self.files():
            with file.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
            total.update(file.name.encode())
        for lora in self.loras:
            total.update(hashlib.sha256(lora.path.read_bytes()).digest())
            total.update(f"lora {lora.scale}".encode())
        return total.hexdigest()


def _hub_id(folder: Path) -> str | None:
    """What names a folder of the hub's cache on every machine; None for any other folder."""
    folder = folder.resolve()
    if folder.parent.name != "snapshots":  # models--owner--name/snapshots/hash
        return None
    return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)


def _folder_name(folder: Path) -> str:
    return (_hub_id(folder) or folder.resolve().name).rpartition("/")[-1]


def default_picture_size(checkpoint: Checkpoint) -> int:
    """Side in pixels of the pictures that a checkpoint was trained on, read without loading it.

    Raises:
        CheckpointError: no folder is known that says so.
    """
    if checkpoint.folder is None:
        raise CheckpointError(
            f"{checkpoint.weights} does not say its picture size: add --base, or --height and "
            "--width."
        )
    unet, vae = (
        json.loads((checkpoint.folder / part / "config.json").read_text())
        for part in ("unet", "vae")
    )
    return ImageSpec.of(unet, {"scaling_factor": 1.0, **vae}).picture_size


def _is_loaded(file: Path) -> bool:
    """Whether diffusers reads this weight file: not the variants that may lie beside it."""
    return file.suffix == ".safetensors" and not {".fp16", ".non_ema"} & set(file.suffixes[:-1])


def find_checkpoint(
    ckpt: str | Path | None = None,
    base: str | Path | None = None,
    loras: Sequence[str] = (),
    vae: str | Path | None = None,
) -> Checkpoint:
    """Find out what `ckpt` is, without loading it.

    Args:
        ckpt: diffusers folder, hub id, single-file or UNet-only `.safetensors`; None for the
            default model.
        base: diffusers folder or hub id that completes a `.safetensors` file. UNet weights that
            name their base in their header do not need it.
        loras: LoRA files, each as FILE or FILE:SCALE.
        vae: folder or hub id of an autoencoder that replaces the model's own.

    Raises:
        CheckpointError: nothing there, a pickle, corrupt, or of another kind.
    """
    found = _find_weights(default_model() if ckpt is None else ckpt, base)
    return replace(
        found,
        loras=tuple(find_lora(one) for one in loras),
        vae=_find_vae(vae) if vae else None,
    )


def _find_weights(ckpt: str | Path, base: str | Path | None) -> Checkpoint:
    path = Path(ckpt).expanduser()
    refuse_pickle(path)
    if not path.is_file():
        if base is not None:
            raise CheckpointError(f"{ckpt} is complete in itself; leave out --base {base}.")
        return Checkpoint(_find_folder(ckpt))
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a .safetensors file or a diffusers folder.")
    names, metadata = read_header(path)
    if any(name.startswith("model.diffusion_model.") for name in names):
        return Checkpoint(_find_folder(base) if base else None, path, "pipeline")
    if not {"conv_in.weight", "conv_out.weight"} <= names:
        what = "a LoRA" if any("lora" in name for name in names) else "something else"
        raise CheckpointError(
            f"{path} is neither a UNet nor a Stable Diffusion checkpoint but {what}: its first "
            f"tensor is {min(names, default='missing')!r}."
        )
    base = base or metadata.get("base")
    if not base:
        raise CheckpointError(
            f"{path} holds a UNet alone and does not name its base. Add --base with the diffusers "
            "folder or hub id of the model it was trained from."
        )
    default = base == DEFAULT_MODEL_NAME
    return Checkpoint(_find_folder(default_model() if default else base), path, "unet")


def _find_folder(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise CheckpointError(
                f"{path} is not a diffusers folder: it holds no model_index.json."
            )
        _refuse_unusable(path)
        return path
    if not path.exists() and _HUB_ID.fullmatch(str(folder)):
        return _download(str(folder))
    raise CheckpointError(f"There is no diffusers folder at {path}. Check the path.")


def _refuse_unusable(path: Path) -> None:
    try:
        index = json.loads((path / "model_index.json").read_text())
        pipeline_class = index.get("_class_name")
        parts = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    except (ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path / 'model_index.json'} is damaged ({error}).") from error
    if pipeline_class != "StableDiffusionPipeline":
        raise CheckpointError(
            f"{path} is a {pipeline_class}; encache runs text-to-image checkpoints of Stable "
            "Diffusion 1.x and 2.x (StableDiffusionPipeline)."
        )
    for part in sorted(parts & {"unet", "vae", "text_encoder"}):
        refuse_without_safetensors(path / part)
    for part in sorted(parts & set(_PARTS)):
        if not (path / part).is_dir():
            raise CheckpointError(f"{path} is incomplete: it holds no {part} folder.")


def _find_vae(vae: str | Path) -> Path:
    path = Path(vae).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(str(vae)):
        return check_vae(path)
    from huggingface_hub import snapshot_download

    kinds = ["config.json", "*.safetensors"]
    return check_vae(_fetch(str(vae), lambda: snapshot_download(str(vae), allow_patterns=kinds)))


def _download(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline

    return _fetch(hub_id, lambda: DiffusionPipeline.download(hub_id, use_safetensors=True))


def _fetch(hub_id: str, download: Callable[[], str]) -> Path:
    try:
        return Path(download())
    except Exception as error:  # several layers of clients, each with exceptions of its own
        raise CheckpointError(
            f"{hub_id!r} is no local path and could not be fetched from the hub: {reason_of(error)}"
        ) from error


def load_pipeline(
    checkpoint: Checkpoint,
    dtype: "torch.dtype | None" = None,
    device: "torch.device | str" = "cpu",
) -> "StableDiffusionPipeline":
    """Load the checkpoint as a StableDiffusionPipeline without safety checker.

    Args:
        checkpoint: from `find_checkpoint`.
        dtype: of the weights; float32 by default.
        device: that will run it.

    Raises:
        CheckpointError: the files are damaged or belong to another architecture.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    dtype = dtype or torch.float32
    options = {
        "torch_dtype": dtype,
        "safety_checker": None,
        "requires_safety_checker": False,
        "use_safetensors": True,
    }
    single_file = checkpoint.weights is not None and checkpoint.holds == "pipeline"
    folder = str(checkpoint.folder) if checkpoint.folder else None
    _hide_progress_bars()
    try:
        if single_file:
            pipeline = StableDiffusionPipeline.from_single_file(
                str(checkpoint.weights), config=folder, **options
            )
        else:
            pipeline = StableDiffusionPipeline.from_pretrained(
                folder, local_files_only=True, **options
            )
    except Exception as error:  # damaged files surface as any exception of four libraries
        what = checkpoint.weights if single_file else checkpoint.folder
        incomplete = single_file and not checkpoint.folder
        hint = " If it is not complete, add --base." if incomplete else ""
        raise CheckpointError(
            f"{what} could not be loaded as Stable Diffusion: {reason_of(error)}{hint}"
        ) from error
    if checkpoint.weights and not single_file:
        _lay_over(pipeline.unet, checkpoint)
    for lora in checkpoint.loras:
        fuse(pipeline, lora)
    if checkpoint.vae:
        replace_vae(pipeline, checkpoint.vae, dtype)
    pipeline.set_progress_bar_config(disable=True)
    if torch.device(device).type != "cpu":  # there it is, and diffusers would warn of fp16
        pipeline.to(device)
    if torch.device(device).type == "cuda":
        # As its convolutions read them; on a CPU they are a quarter slower that way.
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def _hide_progress_bars() -> None:
    """Loading takes a second; three nested bars per model say nothing."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _lay_over(unet: "torch.nn.Module", checkpoint: Checkpoint) -> None:
    from safetensors.torch import load_file

    assert checkpoint.weights
    new, old = load_file(checkpoint.weights), unet.state_dict()
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
    unet.load_state_dict(new)
