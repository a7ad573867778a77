"""`encache-eval`: what a cached sampler costs and saves, paired with the full one."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from encache.command import Command, FiniteFloat
from encache.contract.dtypes import DTYPES
from encache.errors import EncacheError
from encache.model.spec import CUTS, DEFAULT_CUT, Cut
from encache.runtime.blend import BLENDS, DEFAULT_BLEND, Blend
from encache.runtime.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from encache.evaluate.real import Real
    from encache.evaluate.sampling import Evaluation, Model
    from encache.evaluate.settings import Protocol, Setting
    from encache.model.checkpoint import Checkpoint


#: Compared unless others are asked for.
DEFAULT_STRIDES = (3, 5, 10)


@click.command(cls=Command)
@click.option(
    "--ckpt",
    "ckpts",
    multiple=True,
    help="diffusers folder, hub id or .safetensors file; several are compared, the first one is "
    "the reference of all. Default: the model that ships with encache.",
)
@click.option("--base", help="diffusers folder or hub id that completes .safetensors files.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="One prompt per line, or COCO's captions (.json). Default: the shipped model's own.",
)
@click.option("--num-images", type=click.IntRange(1), default=64, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True)
@click.option("--scheduler", type=click.Choice(tuple(SCHEDULERS)), help="Default: the model's own.")
@click.option(
    "--guidance-scale",
    type=FiniteFloat(),
    help="Default: the first model's own.",
)
@click.option("--height", type=click.IntRange(8), help="Pixels. Default: the model's own size.")
@click.option("--width", type=click.IntRange(8), help="Pixels. Default: the model's own size.")
@click.option(
    "--cut",
    "cuts",
    type=click.Choice(CUTS),
    multiple=True,
    default=(DEFAULT_CUT,),
    show_default=True,
)
@click.option(
    "--blend",
    "blends",
    type=click.Choice(BLENDS),
    multiple=True,
    default=(DEFAULT_BLEND, "reuse"),
    show_default=True,
)
@click.option(
    "--stride",
    "strides",
    type=click.IntRange(2),
    multiple=True,
    help=f"Repeatable. Default: {', '.join(map(str, DEFAULT_STRIDES))}, as far as the calls allow.",
)
@click.option("--paper-key-calls", is_flag=True, help="Also Faster Diffusion's list of key calls.")
@click.option("--prior-noise", is_flag=True, help="Also with prior noise.")
@click.option(
    "--plain-steps",
    type=click.IntRange(1),
    multiple=True,
    help="Also the plain sampler with so many steps. Always: as many as each setting's "
    "arithmetic buys.",
)
@click.option(
    "--reference-steps",
    type=click.IntRange(1),
    help="Measure errors against the plain sampler with so many steps, not against --steps.",
)
@click.option(
    "--real",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of real pictures for Frechet distance, precision, recall; with metadata.jsonl "
    "or metadata.csv also retrieval.",
)
@click.option(
    "--extractor",
    type=click.Choice(("none", "efficientnet-lite0", "inception")),
    default="none",
    show_default=True,
    help="Network whose features are compared; only inception's distance is called FID.",
)
@click.option(
    "--extractor-weights",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Its weights, instead of the installed or downloaded ones.",
)
@click.option("--clip", help="CLIP for CLIPScore: folder or hub id.")
@click.option(
    "--backend",
    type=click.Choice(("torch", "onnxruntime")),
    default="torch",
    show_default=True,
)
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True)
@click.option("--device", help="Of torch. Default: a GPU where there is one.")
@click.option(
    "--engine-dir", type=click.Path(path_type=Path), default=Path("engines"), show_default=True
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Pictures at once."
)
@click.option(
    "--max-decode-batch",
    type=click.IntRange(1),
    help="Most rows (calls x pictures x guidance) in one decoder run; bounds memory.",
)
@click.option("--drift/--no-drift", default=True, show_default=True)
@click.option(
    "--grid",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Prompts shown as pictures.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for index.html, report.json and rows.csv; a repeated command goes on.",
)
@click.option("--dry-run", is_flag=True, help="List the settings and stop.")
def main(
    ckpts: tuple[str, ...],
    base: str | None,
    prompts: Path | None,
    num_images: int,
    steps: int,
    scheduler: str | None,
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    cuts: tuple[Cut, ...],
    blends: tuple[Blend, ...],
    strides: tuple[int, ...],
    paper_key_calls: bool,
    prior_noise: bool,
    plain_steps: tuple[int, ...],
    reference_steps: int | None,
    real: Path | None,
    extractor: Literal["none", "efficientnet-lite0", "inception"],
    extractor_weights: Path | None,
    clip: str | None,
    backend: str,
    dtype: str,
    device: str | None,
    engine_dir: Path,
    batch_size: int,
    max_decode_batch: int | None,
    drift: bool,
    grid: int,
    report: Path,
    dry_run: bool,
) -> None:
    """Compare cached sampling with the full sampler and with fewer plain steps, at equal seeds.

    Every checkpoint is sampled with every combination of cut, blend and stride; one that was
    trained for a plan (encache-train shared) by that plan alone, beside the model it comes from.

    Example: encache-eval --stride 5 --cut mid --cut up2 --report runs/report
    """
    if real and extractor == "none":
        raise click.UsageError("--real needs --extractor.")
    if device and backend != "torch":
        raise click.UsageError(f"--device is for torch; {backend} chooses its own.")
    if base and not any(one.endswith(".safetensors") for one in ckpts):
        raise click.UsageError("--base completes .safetensors files, and no --ckpt is one.")

    from encache.evaluate import rows
    from encache.evaluate.machine import describe_machine
    from encache.evaluate.real import read_real
    from encache.evaluate.report import write_report
    from encache.evaluate.results import Report
    from encache.evaluate.settings import (
        Protocol,
        Setting,
        cached_settings,
        own_setting,
        read_prompts,
    )
    from encache.model.checkpoint import default_model
    from encache.model.preset import UNSAID
    from encache.runtime.plan import paper_key_calls as key_calls_of_paper
    from encache.runtime.plan import strides_within

    if (report / "index.html").exists() and not (report / "store").is_dir():
        raise EncacheError(f"{report} holds a page of something else: choose another --report.")
    models = _open_models(ckpts, base, backend, dtype, device, engine_dir)
    if prompts is None and any(one.checkpoint.folder != default_model() for one in models.values()):
        raise click.UsageError("Give --prompts; only the shipped model has its own.")
    if guidance_scale is None:
        guidance_scale = next(iter(models.values())).checkpoint.guidance_scale
    texts = read_prompts(prompts or default_model() / "prompts.txt")
    protocol = Protocol(
        tuple(texts), num_images, guidance_scale, height, width, batch_size, max_decode_batch
    )
    trained_for = {
        label: own_setting(label, model.checkpoint)
        for label, model in models.items()
        if model.checkpoint.preset != UNSAID
    }
    # Weights that were trained for one plan are drawn by it; under another they mean little.
    fulls = [Setting(one, scheduler or "", steps) for one in models if one not in trained_for]
    first = fulls[0]
    model = models[first.model]
    reference = Setting(first.model, first.scheduler, reference_steps or steps)
    num_calls = model.plan(first).num_calls
    cached = cached_settings(
        fulls,
        cuts,
        blends,
        strides or strides_within(DEFAULT_STRIDES, num_calls),
        [key_calls_of_paper(num_calls)] if paper_key_calls else [],
        [False, True] if prior_noise else [False],
    )
    asked = [Setting(first.model, first.scheduler, count) for count in plain_steps]
    full_of = {full.model: full for full in fulls}
    full_of |= {
        label: full_of[_base_of(models[label].checkpoint, models) or first.model]
        for label in trained_for
    }
    cached += trained_for.values()
    opponents = {
        one: rows.plain_at_equal_arithmetic(models, protocol, one, full_of[one.model])
        for one in cached
    }
    listed = list(dict.fromkeys([reference, *fulls, *asked, *opponents.values(), *cached]))
    if dry_run:
        click.echo("\n".join(one.name for one in listed))
        return
    evaluation = _open_evaluation(
        models, protocol, report / "store", extractor, extractor_weights, clip
    )
    pictures = None
    if real and evaluation.extractor:
        default_height, default_width = model.spec.picture_size
        size = height or default_height, width or default_width
        pictures = read_real(real, evaluation.extractor, size, evaluation.store)
    _measure(evaluation, listed, reference)
    page = write_report(
        Report(
            title=f"Cached sampling of {', '.join(models)}",
            machine=describe_machine(),
            protocol=_facts(evaluation, reference, pictures),
            rows=tuple(
                rows.make_row(
                    evaluation, one, reference, full_of[one.model], opponents.get(one), pictures
                )
                for one in listed
            ),
            drift=evaluation.drift(first) if drift else None,
            grid=_grid(evaluation, listed, grid),
        ),
        report,
    )
    click.echo(page)


def _open_models(
    ckpts: Sequence[str],
    base: str | None,
    backend: str,
    dtype: str,
    device: str | None,
    engine_dir: Path,
) -> "dict[str, Model]":
    """The checkpoints by labels that differ; the first is sampled in full."""
    import torch

    from encache.evaluate.sampling import Backend, Model
    from encache.model.checkpoint import find_checkpoint
    from encache.model.preset import UNSAID

    # A folder or hub id is complete in itself, so that it can be compared with its fine-tunings.
    bases = [base if one.endswith(".safetensors") else None for one in ckpts]
    found = [find_checkpoint(*pair) for pair in zip(ckpts, bases, strict=True)]
    found = found or [find_checkpoint()]
    if found[0].preset != UNSAID:  # what it was trained from, which it is held against
        found = [found[0].base, *(one for one in found if one != found[0].base)]
    names = [one.name for one in found]
    labels = [
        name if names.count(name) == 1 else f"{name}-{index + 1}"
        for index, name in enumerate(names)
    ]
    device = device or ("cuda" if torch.cuda.is_available() and backend == "torch" else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise click.UsageError(f"--device {device} cannot be used: {reason}") from error
    chosen = Backend(backend, dtype, device, engine_dir)
    return {label: Model(one, chosen) for label, one in zip(labels, found, strict=True)}


def _base_of(trained: "Checkpoint", models: "dict[str, Model]") -> str | None:
    """The label of the model that weights were trained from, if it is there."""
    labels = [one for one, model in models.items() if model.checkpoint == trained.base]
    return labels[0] if labels else None


def _open_evaluation(
    models: "dict[str, Model]",
    protocol: "Protocol",
    store: Path,
    extractor: Literal["none", "efficientnet-lite0", "inception"],
    extractor_weights: Path | None,
    clip: str | None,
) -> "Evaluation":
    from encache.evaluate.extractors import load_clip, load_extractor
    from encache.evaluate.sampling import Evaluation
    from encache.evaluate.store import Store

    device = next(iter(models.values())).backend.device
    return Evaluation(
        models,
        protocol,
        Store(store),
        None if extractor == "none" else load_extractor(extractor, extractor_weights, device),
        load_clip(clip, device) if clip else None,
    )


def _facts(evaluation: "Evaluation", reference: "Setting", real: "Real | None") -> dict[str, Any]:
    """What a reader needs to repeat the evaluation."""
    protocol, models = evaluation.protocol, evaluation.models
    backend = models[reference.model].backend
    return {
        "prompts": len(protocol.prompts),
        "pictures": protocol.num_images,
        "seeds": f"0 to {protocol.num_images - 1}",
        "guidance scale": protocol.guidance_scale,
        "reference": reference.name,
        "extractor": evaluation.extractor.name if evaluation.extractor else "none",
        "CLIP": evaluation.clip.name if evaluation.clip else "none",
        "backend": f"{backend.name} {backend.dtype} on {backend.device}",
        "pictures at once": protocol.batch_size,
        "checkpoints": {
            label: f"{one.checkpoint.weights or one.checkpoint.folder}, "
            f"sha256 {one.checkpoint.fingerprint}"
            for label, one in models.items()
        },
        "real pictures": len(real.features) if real else "none",
        "unreadable": list(real.unreadable) if real else [],
    }


def _measure(evaluation: "Evaluation", listed: "Sequence[Setting]", reference: "Setting") -> None:
    """Batch by batch through all settings, so that an unfinished run has pairs of every one."""
    from encache.progress import progress

    batches = evaluation.protocol.batches
    with progress(total=len(listed) * evaluation.protocol.num_images, unit="picture") as bar:
        for pictures, setting in product(batches, listed):
            bar.set_description(setting.name[-30:])
            evaluation.compare(setting, reference, pictures)
            if evaluation.extractor or evaluation.clip:
                evaluation.extract(setting, pictures)
            bar.update(len(pictures))


def _grid(evaluation: "Evaluation", listed: "Sequence[Setting]", count: int) -> dict[str, Any]:
    """The first pictures of every setting, by prompt and setting."""
    from diffusers.image_processor import VaeImageProcessor

    protocol = evaluation.protocol
    grid: dict[str, dict[str, Any]] = {}
    for batch, setting in product(protocol.batches, listed):
        shown = [index for index in batch if index < count]
        if not shown:
            continue
        for index, picture in zip(shown, evaluation.pictures(setting, batch), strict=False):
            prompt = f"{protocol.prompts_of(range(index, index + 1))[0]} (seed {index})"
            image = VaeImageProcessor.numpy_to_pil(picture.permute(1, 2, 0).numpy())[0]
            grid.setdefault(prompt, {})[setting.name] = image
    return grid
