"""From measurements to one row per setting: means, intervals, distances, costs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from encache.evaluate.costs import gflop_of, steps_within
from encache.evaluate.distribution import (
    bootstrap_interval,
    bootstrap_ratio,
    frechet_distance,
    inception_score,
    precision_recall,
    retrieval_accuracy,
)
from encache.evaluate.real import Real
from encache.evaluate.results import Interval, Row
from encache.evaluate.sampling import Evaluation, Model
from encache.evaluate.settings import Protocol, Setting
from encache.evaluate.store import Arrays

#: Of the inception score, as its authors have it.
SPLITS = 10


def plain_at_equal_arithmetic(
    models: Mapping[str, Model], protocol: Protocol, setting: Setting, full: Setting
) -> Setting:
    """The full sampler with as many steps as the setting's arithmetic buys."""
    model = models[full.model]
    budget = _gflop(models, protocol, setting) / protocol.rows_of(full)
    arithmetic = model.arithmetic(full.cut, protocol)
    steps = steps_within(model.scheduler(full), full.steps, budget, arithmetic)
    return replace(full, steps=steps)


def make_row(
    evaluation: Evaluation,
    setting: Setting,
    reference: Setting,
    full: Setting,
    opponent: Setting | None = None,
    real: Real | None = None,
) -> Row:
    """Gather one setting's batches.

    Args:
        evaluation: whose store holds the measurements, or makes them.
        setting: the row.
        reference: what its errors are measured against.
        full: the full sampler, whose arithmetic is 1.
        opponent: the plain sampler at equal arithmetic.
        real: for distances to real pictures.
    """
    protocol = evaluation.protocol
    pairs = evaluation.compare_all(setting, reference)
    prompts = protocol.prompts_of(range(protocol.num_images))
    seconds = [
        float(evaluation.latents(setting, one)["seconds"]) / len(one) for one in protocol.batches
    ]
    extracted: Arrays = {}
    if evaluation.extractor or evaluation.clip:
        extracted = evaluation.extract_all(setting)
    models = evaluation.models
    gflop = _gflop(models, protocol, setting)
    plan = models[setting.model].plan(setting)
    is_reference = setting == reference
    return Row(
        name=setting.name,
        checkpoint=setting.model,
        scheduler=setting.scheduler,
        steps=setting.steps,
        cut="" if setting.plain else setting.cut,
        blend="" if setting.plain else setting.blend,
        key_calls=plan.key_calls,
        prior_noise=setting.prior_noise,
        plain=setting.plain,
        num_images=protocol.num_images,
        encoder_runs=plan.num_evaluations,
        num_calls=plan.num_calls,
        gflop=gflop,
        share=gflop / _gflop(models, protocol, full),
        seconds=median(seconds),
        latent_error=None if is_reference else _interval(pairs["latent_error"], prompts),
        opponent=opponent.name if opponent else None,
        times_plain=_times_plain(evaluation, pairs["latent_error"], opponent, reference),
        psnr=None if is_reference else _interval(pairs["psnr"], prompts),
        ssim=None if is_reference else _interval(pairs["ssim"], prompts),
        perceptual=(
            None
            if is_reference or "perceptual" not in pairs
            else _interval(pairs["perceptual"], prompts)
        ),
        frechet_to_full=(
            None if is_reference else _frechet_to_full(evaluation, extracted, reference)
        ),
        clip_score=(
            _interval(extracted["clip_score"], prompts) if "clip_score" in extracted else None
        ),
        **_distribution(extracted, real, prompts),
    )


def _distribution(extracted: Arrays, real: Real | None, prompts: Sequence[str]) -> dict[str, Any]:
    """The row's fields about the pictures as a whole."""
    found: dict[str, Any] = {}
    if "probabilities" in extracted and len(prompts) >= SPLITS:
        found["inception_score"] = inception_score(extracted["probabilities"], SPLITS)[0]
    if real is None:
        return found
    features = extracted["features"]
    found["frechet"] = frechet_distance(features, real.features)
    if real.spatial is not None:
        found["spatial_frechet"] = frechet_distance(extracted["spatial"], real.spatial)
    found["precision"], found["recall"] = precision_recall(features, real.features)
    if real.captions:
        hits = retrieval_accuracy(features, prompts, real.features, real.captions)
        found["retrieval"] = _interval(np.asarray(hits, dtype=float), prompts)
    return found


def _frechet_to_full(evaluation: Evaluation, extracted: Arrays, reference: Setting) -> float | None:
    if "features" not in extracted or evaluation.protocol.num_images < 2:
        return None
    return frechet_distance(extracted["features"], evaluation.extract_all(reference)["features"])


def _times_plain(
    evaluation: Evaluation, errors: np.ndarray, opponent: Setting | None, reference: Setting
) -> Interval | None:
    """The ratio of the mean errors, with an interval over pairs of pictures."""
    if opponent is None or opponent == reference:  # whose error is zero
        return None
    theirs = evaluation.compare_all(opponent, reference)["latent_error"]
    if not (np.isfinite(errors).all() and np.isfinite(theirs).all() and theirs.any()):
        return None
    prompts = evaluation.protocol.prompts_of(range(len(errors)))
    return Interval(*bootstrap_ratio(errors, theirs, prompts))


def _interval(values: np.ndarray, prompts: Sequence[str]) -> Interval:
    mean, finite = float(values.mean()), np.isfinite(values).all()
    low, high = bootstrap_interval(values, prompts) if finite else (np.nan, np.nan)
    return Interval(mean, float(low), float(high))


def _gflop(models: Mapping[str, Model], protocol: Protocol, setting: Setting) -> float:
    """UNet arithmetic of one picture."""
    model = models[setting.model]
    plan, arithmetic = model.plan(setting), model.arithmetic(setting.cut, protocol)
    return gflop_of(plan, arithmetic, protocol.rows_of(setting))
