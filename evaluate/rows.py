"""From measurements to one row per setting: means, intervals, distances, costs."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from encache.errors import EncacheError
from encache.evaluate.distribution import (
    bootstrap_interval,
    frechet_distance,
    inception_score,
    precision_recall,
    retrieval_accuracy,
)
from encache.evaluate.results import Interval, Row
from encache.evaluate.sampling import Evaluation
from encache.evaluate.settings import Setting
from encache.evaluate.store import Arrays, Store
from encache.runtime.compare import steps_within

if TYPE_CHECKING:
    from encache.evaluate.extractors import Extractor

#: Real pictures that are read and extracted together.
REAL_BATCH = 32
#: Of the inception score, as its authors have it.
SPLITS = 10
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Real:
    """Features [M, D] of real pictures, and their captions where metadata.jsonl gives them."""

    features: np.ndarray
    spatial: np.ndarray | None
    captions: tuple[str, ...] | None


def read_real(folder: Path, extractor: "Extractor", size: tuple[int, int], store: Store) -> Real:
    """Extract the features of all pictures in a folder, scaled and cropped to `size` (H, W).

    Raises:
        EncacheError: there are none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if len(paths) < 2:
        raise EncacheError(f"{folder} holds {len(paths)} pictures; a distribution needs more.")
    names = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in paths)
    description = {
        "real": hashlib.sha256(names.encode()).hexdigest(),
        "extractor": extractor.name,
        "size": size,
    }
    parts: list[np.ndarray] = []
    spatials: list[np.ndarray] = []

    def extract() -> dict[str, np.ndarray]:
        for start in tqdm(range(0, len(paths), REAL_BATCH), desc="real pictures"):
            batch = [_read(path, size) for path in paths[start : start + REAL_BATCH]]
            extracted = extractor(torch.stack(batch))
            parts.append(extracted.features.numpy())
            if extracted.spatial is not None:
                spatials.append(extracted.spatial.numpy())
        spatial = {"spatial": np.concatenate(spatials)} if spatials else {}
        return {"features": np.concatenate(parts), **spatial}

    arrays = store.get(description, extract)
    return Real(arrays["features"], arrays.get("spatial"), _read_captions(folder, paths))


def _read(path: Path, size: tuple[int, int]) -> Tensor:
    height, width = size
    with Image.open(path) as image:
        picture = image.convert("RGB")
    scale = max(width / picture.width, height / picture.height)
    wide, high = (
        max(one, round(side * scale))
        for one, side in zip((width, height), picture.size, strict=True)
    )
    picture = picture.resize((wide, high), Image.Resampling.LANCZOS)
    left, top = (wide - width) // 2, (high - height) // 2
    pixels = np.asarray(picture.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _read_captions(folder: Path, paths: Sequence[Path]) -> tuple[str, ...] | None:
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        return None
    rows = [json.loads(line) for line in metadata.read_text().splitlines() if line.strip()]
    captions = {row["file_name"]: row["text"] for row in rows}
    return tuple(captions.get(str(path.relative_to(folder)), "") for path in paths)


def plain_at_equal_arithmetic(evaluation: Evaluation, setting: Setting) -> Setting:
    """The plain sampler with as many steps as the setting's arithmetic buys."""
    model = evaluation.models[setting.model]
    arithmetic = model.arithmetic(setting.cut, evaluation.protocol)
    plan = model.plan(setting)
    gflop = plan.num_encoder_runs * arithmetic.encoder + plan.num_calls * arithmetic.decoder
    steps = steps_within(model.scheduler(setting), setting.steps, gflop, arithmetic)
    return Setting(setting.model, setting.scheduler, steps)


def make_row(
    evaluation: Evaluation, setting: Setting, reference: Setting, full: Setting, real: Real | None
) -> Row:
    """Gather one setting's batches.

    Args:
        evaluation: whose store holds the measurements, or makes them.
        setting: the row.
        reference: what its errors are measured against.
        full: the full sampler, whose arithmetic is 1.
        real: for distances to real pictures.
    """
    protocol = evaluation.protocol
    pairs = gather([evaluation.compare(setting, reference, one) for one in protocol.batches])
    seconds = [evaluation.latents(setting, one)["seconds"] for one in protocol.batches]
    extracted: Arrays = {}
    if evaluation.extractor or evaluation.clip:
        extracted = gather([evaluation.extract(setting, one) for one in protocol.batches])
    plan = evaluation.models[setting.model].plan(setting)
    is_reference = setting == reference
    return Row(
        name=setting.name,
        checkpoint=setting.model,
        scheduler=setting.scheduler,
        steps=setting.steps,
        cut=setting.cut,
        blend=setting.blend,
        key_calls=plan.key_calls,
        prior_noise=setting.prior_noise,
        plain=setting.plain,
        num_images=protocol.num_images,
        encoder_runs=plan.num_encoder_runs,
        num_calls=plan.num_calls,
        gflop=_gflop(evaluation, setting),
        share=_gflop(evaluation, setting) / _gflop(evaluation, full),
        seconds=float(sum(seconds)) / protocol.num_images,
        latent_error=None if is_reference else _interval(pairs["latent_error"]),
        psnr=None if is_reference else _interval(pairs["psnr"]),
        ssim=None if is_reference else _interval(pairs["ssim"]),
        clip_score=_interval(extracted["clip_score"]) if "clip_score" in extracted else None,
        **_distribution(evaluation, extracted, real),
    )


def gather(batches: Sequence[Arrays]) -> Arrays:
    """Join the arrays of all batches by name."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _distribution(evaluation: Evaluation, extracted: Arrays, real: Real | None) -> dict[str, Any]:
    """The row's fields about the pictures as a whole."""
    found: dict[str, Any] = {}
    if "probabilities" in extracted and evaluation.protocol.num_images >= SPLITS:
        found["inception_score"] = inception_score(extracted["probabilities"], SPLITS)[0]
    if real is None:
        return found
    features = extracted["features"]
    found["frechet"] = frechet_distance(features, real.features)
    if real.spatial is not None:
        found["spatial_frechet"] = frechet_distance(extracted["spatial"], real.spatial)
    found["precision"], found["recall"] = precision_recall(features, real.features)
    if real.captions:
        prompts = evaluation.protocol.prompts_of(range(evaluation.protocol.num_images))
        hits = retrieval_accuracy(features, prompts, real.features, real.captions)
        found["retrieval"] = _interval(np.asarray(hits, dtype=float))
    return found


def _interval(values: np.ndarray) -> Interval:
    mean = float(values.mean())
    low, high = bootstrap_interval(values) if np.isfinite(values).all() else (np.nan, np.nan)
    return Interval(mean, float(low), float(high))


def _gflop(evaluation: Evaluation, setting: Setting) -> float:
    """UNet arithmetic of one picture."""
    arithmetic = evaluation.models[setting.model].arithmetic(setting.cut, evaluation.protocol)
    plan = evaluation.models[setting.model].plan(setting)
    rows = 2 if evaluation.protocol.guidance_scale > 1 else 1
    once = plan.num_encoder_runs * arithmetic.encoder + plan.num_calls * arithmetic.decoder
    return rows * once
