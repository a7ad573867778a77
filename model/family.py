"""The diffusers pipelines that encache reads, one entry per class; needs no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
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
        hosted: whether the pipeline keeps its own loop, in which `encache.enable` caches; what
            draws the others is `EncachePipeline`.
        base: of such a pipeline the text-to-image pipeline whose checkpoints it takes, if any.
        denoiser: name of the part that is cached.
        codec: name of its autoencoder; empty where it draws pixels.
        inputs: what its call takes beside texts, or in their place: the name by which a user says
            it, and the call's own.
        frames: of a clip, unless asked otherwise; 0 where it draws pictures.
        controlled: whether a ControlNet adds to what its denoiser computes.
        across_frames: whether its denoiser looks from row to row of a batch, which are frames.
        engines: the pipeline whose engines serve it, where that is another one.
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
    hosted: bool = False
    base: str = ""
    denoiser: str = "unet"
    codec: str = "vae"
    inputs: Mapping[str, str] = field(default_factory=dict)
    frames: int = 0
    controlled: bool = False
    across_frames: bool = False
    engines: str = ""

    @property
    def clips(self) -> bool:
        """Whether its denoiser takes whole clips; else each frame is a row."""
        return bool(self.frames) and not self.across_frames

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Their names, in the order of the text encoders."""
        return tuple(tokenizer_of(name) for name in self.text_encoders)

    @property
    def weighted(self) -> tuple[str, ...]:
        """The parts with weights that reach a picture; a safety checker does not."""
        return tuple(filter(None, (*self.text_encoders, self.denoiser, self.codec)))

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
#: What `EncachePipeline` draws with, by the class of the diffusers pipeline.
FAMILIES = {one.pipeline: one for one in (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)}

_PICTURE = {"image": "image", "strength": "strength"}
_MASKED = {**_PICTURE, "mask_image": "mask_image"}
_CONTROL = {"control_image": "image"}
_CONTROLLED_PICTURE = {**_PICTURE, "control_image": "control_image"}
_PIXELS = dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))


def _hosted(family: Family, prefix: str, title: str, **changes: Any) -> Family:
    """A family with another one's parts, whose pipeline keeps its own loop."""
    base = {"base": family.pipeline, **changes}
    return replace(family, pipeline=f"{prefix}Pipeline", title=title, hosted=True, **base)


_DEEPFLOYD = Family(
    pipeline="IFPipeline",
    title="DeepFloyd-IF, stage I",
    text_encoders=("text_encoder",),
    guidance_scale=7.0,
    single_file={},
    loading={**_PIXELS, "requires_safety_checker": False},
    hosted=True,
    codec="",
)
#: What `encache.enable` caches in, likewise.
HOSTED = {
    one.pipeline: one
    for one in (
        _hosted(STABLE_DIFFUSION, "StableDiffusionImg2Img", "image to image", inputs=_PICTURE),
        _hosted(STABLE_DIFFUSION, "StableDiffusionInpaint", "inpainting", inputs=_MASKED),
        _hosted(
            STABLE_DIFFUSION,
            "StableDiffusionControlNet",
            "Stable Diffusion with a ControlNet",
            inputs=_CONTROL,
            controlled=True,
        ),
        _hosted(
            STABLE_DIFFUSION,
            "StableDiffusionControlNetImg2Img",
            "image to image with a ControlNet",
            inputs=_CONTROLLED_PICTURE,
            controlled=True,
            engines="StableDiffusionControlNetPipeline",
        ),
        _hosted(
            STABLE_DIFFUSION_XL, "StableDiffusionXLImg2Img", "XL image to image", inputs=_PICTURE
        ),
        _hosted(
            STABLE_DIFFUSION_XL,
            "StableDiffusionXLInpaint",
            "XL inpainting",
            inputs=_MASKED,
            guidance_scale=7.5,
        ),
        _hosted(
            STABLE_DIFFUSION_XL,
            "StableDiffusionXLControlNet",
            "XL with a ControlNet",
            inputs=_CONTROL,
            controlled=True,
        ),
        _hosted(
            STABLE_DIFFUSION_XL,
            "StableDiffusionXLControlNetImg2Img",
            "XL image to image with a ControlNet",
            inputs=_CONTROLLED_PICTURE,
            controlled=True,
            engines="StableDiffusionXLControlNetPipeline",
        ),
        # The UNet is told the guidance, which in other models is a second row.
        _hosted(
            STABLE_DIFFUSION,
            "LatentConsistencyModel",
            "Latent Consistency",
            guidance_scale=1.0,
            base="",
        ),
        _hosted(
            STABLE_DIFFUSION,
            "TextToVideoZero",
            "Text2Video-Zero",
            inputs={"num_frames": "video_length"},
            frames=8,
            across_frames=True,
        ),
        Family(
            pipeline="TextToVideoSDPipeline",
            title="VideoFusion",
            text_encoders=("text_encoder",),
            guidance_scale=9.0,
            single_file={},
            hosted=True,
            inputs={"num_frames": "num_frames"},
            frames=16,
        ),
        _DEEPFLOYD,
        replace(
            _DEEPFLOYD,
            pipeline="IFSuperResolutionPipeline",
            title="DeepFloyd-IF, stage II",
            guidance_scale=4.0,
            inputs={"image": "image"},
        ),
        Family(
            pipeline="DiTPipeline",
            title="DiT",
            text_encoders=(),
            guidance_scale=4.0,
            single_file={},
            hosted=True,
            denoiser="transformer",
            inputs={"class_label": "class_labels"},
        ),
    )
}
_KNOWN = {**FAMILIES, **HOSTED}


def family_of(pipeline: Any) -> Family:
    """The family of a diffusers pipeline.

    Raises:
        CheckpointError: it belongs to none.
    """
    for one in type(pipeline).__mro__:
        if one.__name__ in _KNOWN:
            return _KNOWN[one.__name__]
    raise CheckpointError(f"This is a {type(pipeline).__name__}; {runs(_KNOWN.values())}.")


def runs(families: Iterable[Family]) -> str:
    """What encache runs, in words."""
    named = ", ".join(f"{family.title} ({family.pipeline})" for family in families)
    return f"encache runs {named}"


def must_upcast(family: Family, vae: Any) -> bool:
    """Whether an autoencoder is run in fp32 even where all else is fp16, as diffusers does."""
    return family.upcasts and bool(getattr(vae.config, "force_upcast", False))


def empty_is_zero(pipeline: Any) -> bool:
    """Whether zeros stand for no negative prompt, as a Stable Diffusion XL may want it."""
    return bool(pipeline.config.get("force_zeros_for_empty_prompt"))
