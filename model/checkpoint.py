"""What a user has on disk or on the hub, found and fingerprinted; nothing in it is executed.

Needs no torch, so a finished export is recognised at once. `encache.model.loading` opens it.
"""

import hashlib
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from encache.errors import CheckpointError
from encache.files import parse_json
from encache.model.concept import find_concept
from encache.model.edit import Edit
from encache.model.family import (
    FAMILIES,
    HOSTED,
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    Family,
    runs,
)
from encache.model.hub import find_folder, hub_id_of, short_name
from encache.model.lora import find_lora
from encache.model.preset import PRESET_KEY, UNSAID, Preset
from encache.model.spec import DEFAULT_CUT, Cut
from encache.model.tome import find_tome
from encache.model.vae import find_vae
from encache.model.weights import (
    choose_variant,
    digest_of,
    read_header,
    refuse_pickle,
    refuse_without_safetensors,
    weight_files,
)

_INDEX = "model_index.json"
#: Tensors by which some trainers say that a UNet predicts v, on a schedule without final signal.
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"
MARKS = (_V_PREDICTION, _ZERO_SNR)

#: The name by which a UNet's header refers to the model that ships with encache.
DEFAULT_MODEL_NAME = "encache/emoji"


def default_model() -> Path:
    """Folder of the model that ships with encache: 64x64 emoji."""
    return Path(str(files("encache.model"))) / "emoji"


def fast_model() -> Path:
    """Its fine-tuned companion: UNet weights that need one encoder run and no guidance."""
    return default_model() / "shared.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder, or a safetensors file with the folder that completes it.

    Attributes:
        folder: diffusers folder; None for a single-file checkpoint without one.
        weights: safetensors file whose tensors replace those of the folder.
        holds: "pipeline" for a single-file Stable Diffusion, "unet" for UNet weights alone.
        edits: what changes it once it is loaded, in this order.
        variant: of the folder's weights, such as "fp16"; parts without it have plain ones.
        prediction: prediction_type that the weights' header names; None leaves the folder's.
        zero_snr: whether they were trained on a schedule that ends without signal.
        preset: how UNet weights alone want to be sampled, as far as their header says.
        family: the pipelines that it belongs to.
    """

    folder: Path | None
    weights: Path | None = None
    holds: str = "pipeline"
    edits: tuple[Edit, ...] = ()
    variant: str = ""
    prediction: str | None = None
    zero_snr: bool = False
    preset: Preset = UNSAID
    family: Family = STABLE_DIFFUSION

    @property
    def name(self) -> str:
        """Short name for folders and reports."""
        if self.weights:
            model = self.weights.stem
        else:
            assert self.folder is not None
            model = short_name(self.folder)
        name = "+".join((model, *(edit.name for edit in self.edits)))
        return os.fsencode(name).decode(errors="replace")  # a file's name may be any bytes

    @property
    def base_name(self) -> str | None:
        """What completes UNet weights made from this checkpoint.

        None for a single file, whose own autoencoder and text encoder lie in no folder.
        """
        if self.folder is None or (self.weights and self.holds == "pipeline"):
            return None
        if self.folder == default_model():
            return DEFAULT_MODEL_NAME
        return hub_id_of(self.folder) or str(self.folder.resolve())

    @property
    def base(self) -> "Checkpoint":
        """The model that completes UNet weights alone, with the same edits."""
        return Checkpoint(self.folder, edits=self.edits, variant=self.variant, family=self.family)

    @property
    def index(self) -> Mapping[str, Any]:
        """The folder's model_index.json; empty without a folder."""
        return _read_index(self.folder) if self.folder else {}

    @property
    def guidance_scale(self) -> float:
        """The model's own default, which its preset or its model_index.json may name.

        diffusers keeps keys with an underscore out of its way.
        """
        if self.preset.guidance_scale is not None:
            return float(self.preset.guidance_scale)
        scale = self.index.get("_guidance_scale", self.family.guidance_scale)
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise CheckpointError(f"{self.folder}: _guidance_scale is no number ({scale!r}).")
        return float(scale)

    @property
    def predicts(self) -> str | None:
        """What UNet weights predict, as far as their header says it."""
        return self.prediction or (self.preset.scheduler or {}).get("prediction_type")

    @property
    def cut(self) -> Cut:
        """Where its UNet is cut, unless asked otherwise."""
        return self.preset.cut or DEFAULT_CUT

    def files(self) -> Iterator[Path]:
        """Every file that determines an image before the edits, in a stable order."""
        if self.folder:
            yield self.folder / _INDEX
            for part in self.family.parts:
                folder = self.folder / part
                # What diffusers reads: not the variants that may lie beside it.
                for file in sorted(folder.rglob("*")):
                    if file.suffix in {".json", ".txt"} and not file.name.startswith("."):
                        yield file
                if part in self.family.weighted and folder.is_dir():
                    yield from weight_files(folder, choose_variant([folder], self.variant))
        if self.weights:
            yield self.weights

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the files' contents and names: equal for equal models, wherever."""
        own = digest_of(self.files()).hex()
        if not self.edits:
            return own
        edited = " ".join((own, *(edit.fingerprint for edit in self.edits)))
        return hashlib.sha256(edited.encode()).hexdigest()


def find_checkpoint(
    ckpt: str | Path | None = None,
    base: str | Path | None = None,
    loras: Sequence[str] = (),
    vae: str | Path | None = None,
    variant: str | None = None,
    tome: float | None = None,
    hosted: bool = False,
    concepts: Sequence[str] = (),
) -> Checkpoint:
    """Find out what `ckpt` is, without loading it.

    Args:
        ckpt: diffusers folder, hub id, single-file or UNet-only `.safetensors`; None for the
            default model.
        base: diffusers folder or hub id that completes a `.safetensors` file. UNet weights that
            name their base in their header do not need it.
        loras: LoRA files, each as FILE or FILE:SCALE.
        vae: folder or hub id of an autoencoder that replaces the model's own.
        variant: of a folder's weights, as in diffusers; by default the plain ones, or the variant
            that is there instead of them.
        tome: ratio of tokens to merge in self-attention, such as 0.5.
        hosted: whether it may belong to a pipeline that keeps its own loop.
        concepts: files of textual inversion or Custom Diffusion, each as FILE or FILE:TOKEN.

    Raises:
        CheckpointError: nothing there, a pickle, corrupt, or of another kind.
    """
    found = _find_weights(default_model() if ckpt is None else ckpt, base, variant or "")
    if found.family.hosted and not hosted:
        raise CheckpointError(
            f"{found.folder} is a {found.family.pipeline} ({found.family.title}), which keeps its "
            f"own loop. encache-export and encache-run take it, and in Python encache.enable; "
            f"here {runs(FAMILIES.values())}."
        )
    edits: list[Edit] = [*map(find_concept, concepts), *map(find_lora, loras)]
    if vae:
        edits.append(find_vae(vae, found.variant))
    if tome is not None:
        edits.append(find_tome(tome))
    return replace(found, edits=tuple(edits))


def for_pipeline(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The same checkpoint, opened as a pipeline of another family that has the same parts.

    Raises:
        CheckpointError: it has other parts.
    """
    own = checkpoint.family
    if family not in (own, *_made_of(own)):
        fitting = ", ".join(one.pipeline for one in _made_of(own)) or "no other"
        raise CheckpointError(
            f"{checkpoint.name} is {own.title}, which does not have the parts of a "
            f"{family.pipeline}. It can be: {fitting}."
        )
    return replace(checkpoint, family=family)


def _made_of(family: Family) -> list[Family]:
    """The hosted families whose pipelines take the parts of a text-to-image family."""
    return [one for one in HOSTED.values() if one.base == family.pipeline]


def _find_weights(ckpt: str | Path, base: str | Path | None, variant: str) -> Checkpoint:
    path = Path(ckpt).expanduser()
    refuse_pickle(path)
    if not path.is_file():
        if path.suffix.lower() == ".safetensors" and not path.is_dir():
            raise CheckpointError(f"There is no file {path}. Check the path.")
        if base is not None:
            raise CheckpointError(f"{ckpt} is complete in itself; leave out --base {base}.")
        return _find_folder(ckpt, variant)
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(f"{path} is not a .safetensors file or a diffusers folder.")
    names, metadata = read_header(path)
    # UNet weights alone name their base; in a whole checkpoint the word may mean anything.
    named = metadata.get("base") if "conv_in.weight" in names else None
    try:
        found = _find_file(path, names, base or named, variant)
    except CheckpointError as error:
        if base or not named:
            raise
        raise CheckpointError(f"{path} names its base {named}: {error} Or give --base.") from error
    preset = UNSAID
    if found.holds == "unet" and PRESET_KEY in metadata:
        preset = Preset.from_json(metadata[PRESET_KEY], path)
    return replace(
        found,
        prediction=_prediction(names, metadata),
        zero_snr=_ZERO_SNR in names,
        preset=preset,
    )


def _find_file(
    path: Path, names: Collection[str], base: str | Path | None, variant: str
) -> Checkpoint:
    """A safetensors file by its tensors' names, completed by its base."""
    if any(name.startswith("model.diffusion_model.") for name in names):
        family = _family_of_file(path, names)
        if base:
            found = _find_folder(base, variant)
            if found.family != family:
                raise CheckpointError(
                    f"{path} is {family.title}, and {base} is {found.family.title}: give another "
                    "--base."
                )
            return replace(found, weights=path)
        if variant:
            raise CheckpointError(f"{path} is one file and has no variants: leave out --variant.")
        return Checkpoint(None, path, family=family)
    if not {"conv_in.weight", "conv_out.weight"} <= set(names):
        lora = any("lora" in name for name in names)
        raise CheckpointError(
            f"{path} is neither a UNet nor a Stable Diffusion checkpoint but "
            f"{'a LoRA, which goes to --lora' if lora else 'something else'}: its first tensor is "
            f"{min(names, default='missing')!r}."
        )
    if not base:
        raise CheckpointError(
            f"{path} holds a UNet alone and does not name its base. Add --base with the diffusers "
            "folder or hub id of the model it was trained from."
        )
    folder = default_model() if base == DEFAULT_MODEL_NAME else base
    return replace(_find_folder(folder, variant), weights=path, holds="unet")


def _prediction(names: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """What the weights predict, where their file says so: trainers have several ways to."""
    said = metadata.get("modelspec.prediction_type", "").lower()
    architecture = metadata.get("modelspec.architecture", "")
    trained_by_kohya = metadata.get("ss_v_parameterization", "").lower()
    if (
        said in ("v", "v_prediction", "v-prediction")
        or architecture.startswith("stable-diffusion-v2-768-v")
        or trained_by_kohya == "true"
        or _V_PREDICTION in names
    ):
        return "v_prediction"
    return "epsilon" if said == "epsilon" or trained_by_kohya == "false" else None


def _family_of_file(path: Path, names: Collection[str]) -> Family:
    """The family of a single file by its tensors' names; or raise CheckpointError."""
    others = {
        "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
        "model.diffusion_model.double_blocks.": "Flux",
    }
    for mark, title in others.items():
        if any(name.startswith(mark) for name in names):
            raise CheckpointError(f"{path} is {title}; {runs(FAMILIES.values())}.")
    # Pruned files lack their text encoders; only XL embeds a label of sizes.
    marks = ("conditioner.embedders.", "model.diffusion_model.label_emb.")
    is_xl = any(name.startswith(marks) for name in names)
    return STABLE_DIFFUSION_XL if is_xl else STABLE_DIFFUSION


def _find_folder(folder: str | Path, variant: str) -> Checkpoint:
    path = find_folder(folder, lambda hub_id: _download(hub_id, variant))
    if not path.is_dir():
        raise CheckpointError(f"There is no diffusers folder at {path}. Check the path.")
    if not (path / _INDEX).is_file():
        raise CheckpointError(f"{path} is not a diffusers folder: it holds no {_INDEX}.")
    family = _family_of_folder(path)
    parts = [path / part for part in family.weighted]
    chosen = choose_variant([part for part in parts if part.is_dir()], variant)
    if variant and chosen != variant:
        raise CheckpointError(f"{path} has no weights of the variant {variant}.")
    return Checkpoint(path, variant=chosen, family=family)


def _read_index(folder: Path) -> Mapping[str, Any]:
    path = folder / _INDEX
    try:
        index = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}).") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{path} is damaged (it holds no names).")
    return index


def _family_of_folder(path: Path) -> Family:
    """The family of a diffusers folder that is complete; or raise CheckpointError."""
    index = _read_index(path)
    name = index.get("_class_name")
    known = {**FAMILIES, **HOSTED}
    family = known.get(name) if isinstance(name, str) else None
    if family is None:
        raise CheckpointError(f"{path} is a {name}; {runs(known.values())}.")
    # XL's refiner has one text encoder of two, and IF's large one may lie elsewhere.
    texts = (*family.text_encoders, *family.tokenizers)
    absent = {part for part in texts if family.hosted and index.get(part) == [None, None]}
    for part in family.parts:
        match index.get(part):
            case _ if part in absent:
                continue
            case ["diffusers" | "transformers", str()]:
                pass
            case [str() as module, str() as name]:
                raise CheckpointError(
                    f"The {part} of {path} is a {name} of its own module {module}, and encache "
                    "runs no code that a checkpoint brings along."
                )
            case _:
                raise CheckpointError(f"{path} is incomplete: its {_INDEX} names no {part}.")
        if not (path / part).is_dir():
            raise CheckpointError(f"{path} is incomplete: it holds no {part} folder.")
    for part in family.weighted:
        if part not in absent:
            refuse_without_safetensors(path / part)
    return family


def _download(hub_id: str, variant: str) -> str:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.download(hub_id, variant=variant or None, use_safetensors=True)
