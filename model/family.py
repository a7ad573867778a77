"""The diffusers pipelines that encache reads, one entry per class; needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from encache.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """What a class of pipelines is made of.

    Attributes:
        pipeline: the diffusers class.
        title: as its users call it.
        text_encoders: its text encoders' names, in the order in which their embeddings are joined;
            each has a tokenizer of the like name.
        guidance_scale: its default in diffusers.
        single_file: in a single file, the beginnings of the tensors' names by component.
        loading: arguments that load it without what pictures do not need.
        upcasts: whether diffusers runs its autoencoder in fp32 where that says that it overflows in
            fp16 (`force_upcast`); Stable Diffusion's says so too, by default, and does not.
    """

    pipeline: str
    title: str
    text_encoders: tuple[str, ...]
    guidance_scale: float
    single_file: Mapping[str, str]
    loading: Mapping[str, Any] = field(default_factory=dict)
    upcasts: bool = False

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Their names, in the order of the text encoders."""
        return tuple(tokenizer_of(name) for name in self.text_encoders)

    @property
    def weighted(self) -> tuple[str, ...]:
        """The parts with weights that reach a picture; a safety checker does not."""
        return (*self.text_encoders, "unet", "vae")

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts that reach a picture."""
        return ("scheduler", *self.tokenizers, *self.weighted)


def tokenizer_of(text_encoder: str) -> str:
    """The name of a text encoder's tokenizer."""
    return text_encoder.replace("text_encoder", "tokenizer")


STABLE_DIFFUSION = Family(
    pipeline="StableDiffusionPipeline",
    title="Stable Diffusion 1.x and 2.x",
    text_encoders=("text_encoder",),
    guidance_scale=7.5,
    single_file={"text_encoder": "cond_stage_model.", "vae": "first_stage_model."},
    loading={
        **dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder")),
        "requires_safety_checker": False,
    },
)
STABLE_DIFFUSION_XL = Family(
    pipeline="StableDiffusionXLPipeline",
    title="Stable Diffusion XL",
    text_encoders=("text_encoder", "text_encoder_2"),
    guidance_scale=5.0,
    single_file={
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
        "vae": "first_stage_model.",
    },
    loading={**dict.fromkeys(("feature_extractor", "image_encoder")), "add_watermarker": False},
    upcasts=True,
)
#: By the class of the diffusers pipeline.
FAMILIES = {one.pipeline: one for one in (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)}


def family_of(pipeline: Any) -> Family:
    """The family of a diffusers pipeline.

    Raises:
        CheckpointError: it belongs to none.
    """
    for one in type(pipeline).__mro__:
        if one.__name__ in FAMILIES:
            return FAMILIES[one.__name__]
    known = ", ".join(f"a {family.pipeline} ({family.title})" for family in FAMILIES.values())
    raise CheckpointError(f"This is a {type(pipeline).__name__}; encache runs {known}.")


def must_upcast(family: Family, vae: Any) -> bool:
    """Whether an autoencoder is run in fp32 even where all else is fp16, as diffusers does."""
    return family.upcasts and bool(getattr(vae.config, "force_upcast", False))


def empty_is_zero(pipeline: Any) -> bool:
    """Whether zeros stand for no negative prompt, as a Stable Diffusion XL may want it."""
    return bool(pipeline.config.get("force_zeros_for_empty_prompt"))
