"""`encache-eval`: what a cached sampler costs and saves, paired with the full one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from encache.command import Command
from encache.contract.dtypes import DTYPES
from encache.errors import EncacheError
from encache.evaluate.selection import Selection, SettingOptions
from encache.export.options import EngineDir, SizeOptions
from encache.options import option, takes

if TYPE_CHECKING:
    from encache.evaluate.real import Real
    from encache.evaluate.sampling import Evaluation, Model
    from encache.evaluate.settings import Protocol, Setting


@dataclass(frozen=True)
class _ModelOptions:
    """Which models are sampled, and by what."""

    ckpts: tuple[str, ...] = option(
        "--ckpt",
        default=(),
        multiple=True,
        help="diffusers folder, hub id or .safetensors file; several are compared, the first one "
        "is the reference of all. Default: the model that ships with encache.",
    )
    base: str | None = option(help="diffusers folder or hub id that completes .safetensors files.")
    backend: str = option(type=click.Choice(("torch", "onnxruntime")), default="torch")
    dtype: str = option(type=click.Choice(DTYPES), default="fp32")
    device: str | None = option(help="Of torch. Default: a GPU where there is one.")


@dataclass(frozen=True)
class _MeasureOptions:
    """Which pictures are drawn, and what is measured on them."""

    prompts: Path | None = option(
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="One prompt per line, or COCO's captions (.json). Default: the shipped model's own.",
    )
    num_images: int = option(type=click.IntRange(1), default=64)
    batch_size: int = option(type=click.IntRange(1), default=16, help="Pictures at once.")
    max_decode_batch: int | None = option(
        type=click.IntRange(1),
        help="Most rows (calls x pictures x guidance) in one decoder run; bounds memory.",
    )
    real: Path | None = option(
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="Folder of real pictures for Frechet distance, precision, recall; with "
        "metadata.jsonl or metadata.csv also retrieval.",
    )
    extractor: Literal["none", "efficientnet-lite0", "inception"] = option(
        type=click.Choice(("none", "efficientnet-lite0", "inception")),
        default="none",
        help="Network whose features are compared; only inception's distance is called FID.",
    )
    extractor_weights: Path | None = option(
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Its weights, instead of the installed or downloaded ones.",
    )
    clip: str | None = option(help="CLIP for CLIPScore: folder or hub id.")
    drift: bool = option("--drift/--no-drift", default=True)
    grid: int = option(type=click.IntRange(0), default=8, help="Prompts shown as pictures.")
    dry_run: bool = option(is_flag=True, default=False, help="List the settings and stop.")


@click.command(cls=Command)
@takes(
    chosen=_ModelOptions,
    sampling=SettingOptions,
    size=SizeOptions,
    measured=_MeasureOptions,
    place=EngineDir,
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for index.html, report.json and rows.csv; a repeated command goes on.",
)
def main(
    chosen: _ModelOptions,
    sampling: SettingOptions,
    size: SizeOptions,
    measured: _MeasureOptions,
    place: EngineDir,
    report: Path,
) -> None:
    """Compare cached sampling with the full sampler and with fewer plain steps, at equal seeds.

    Every checkpoint is sampled with every combination of cut, blend and stride; one that was
    trained for a plan (encache-train shared) by that plan alone, beside the model it comes from.

    Example: encache-eval --stride 5 --cut mid --cut up2 --report runs/report
    """
    if measured.real and measured.extractor == "none":
        raise click.UsageError("--real needs --extractor.")
    if chosen.device and chosen.backend != "torch":
        raise click.UsageError(f"--device is for torch; {chosen.backend} chooses its own.")
    if chosen.base and not any(one.endswith(".safetensors") for one in chosen.ckpts):
        raise click.UsageError("--base completes .safetensors files, and no --ckpt is one.")

    from encache.evaluate import rows
    from encache.evaluate.machine import describe_machine
    from encache.evaluate.report import write_report
    from encache.evaluate.results import Report

    if (report / "index.html").exists() and not (report / "store").is_dir():
        raise EncacheError(f"{report} holds a page of something else: choose another --report.")
    models = _open_models(chosen, place.engine_dir)
    protocol = _protocol(models, sampling, size, measured)
    plan = Selection.of(models, protocol, sampling)
    if measured.dry_run:
        click.echo("\n".join(one.name for one in plan.listed))
        return
    evaluation = _open_evaluation(models, protocol, report / "store", measured)
    real = _read_real(evaluation, models[plan.first.model], measured.real, size)
    _measure(evaluation, plan.listed, plan.reference)
    page = write_report(
        Report(
            title=f"Cached sampling of {', '.join(models)}",
            machine=describe_machine(),
            protocol=_facts(evaluation, plan.reference, real),
            rows=tuple(
                rows.make_row(
                    evaluation,
                    one,
                    plan.reference,
                    plan.full_of[one.model],
                    plan.opponents.get(one),
                    real,
                )
                for one in plan.listed
            ),
            drift=evaluation.drift(plan.first) if measured.drift else None,
            grid=_grid(evaluation, plan.listed, measured.grid),
        ),
        report,
    )
    click.echo(page)


def _protocol(
    models: "dict[str, Model]",
    sampling: SettingOptions,
    size: SizeOptions,
    measured: _MeasureOptions,
) -> "Protocol":
    """The pictures that every setting draws."""
    from encache.evaluate.settings import Protocol, read_prompts
    from encache.model.checkpoint import default_model

    ours = all(one.checkpoint.folder == default_model() for one in models.values())
    if measured.prompts is None and not ours:
        raise click.UsageError("Give --prompts; only the shipped model has its own.")
    scale = sampling.guidance_scale
    return Protocol(
        tuple(read_prompts(measured.prompts or default_model() / "prompts.txt")),
        measured.num_images,
        next(iter(models.values())).checkpoint.guidance_scale if scale is None else scale,
        size.height,
        size.width,
        measured.batch_size,
        measured.max_decode_batch,
    )


def _read_real(
    evaluation: "Evaluation", model: "Model", folder: Path | None, size: SizeOptions
) -> "Real | None":
    """What the extractor sees in the real pictures, scaled to the size of the drawn ones."""
    from encache.evaluate.real import read_real

    if not (folder and evaluation.extractor):
        return None
    height, width = model.spec.picture_size
    wanted = size.height or height, size.width or width
    return read_real(folder, evaluation.extractor, wanted, evaluation.store)


def _open_models(chosen: _ModelOptions, engine_dir: Path) -> "dict[str, Model]":
    """The checkpoints by labels that differ; the first is sampled in full."""
    import torch

    from encache.evaluate.sampling import Backend, Model
    from encache.model.checkpoint import find_checkpoint
    from encache.model.preset import UNSAID

    # A folder or hub id is complete in itself, so that it can be compared with its fine-tunings.
    bases = [chosen.base if one.endswith(".safetensors") else None for one in chosen.ckpts]
    found = [find_checkpoint(*pair) for pair in zip(chosen.ckpts, bases, strict=True)]
    found = found or [find_checkpoint()]
    if found[0].preset != UNSAID:  # what it was trained from, which it is held against
        found = [found[0].base, *(one for one in found if one != found[0].base)]
    names = [one.name for one in found]
    labels = [
        name if names.count(name) == 1 else f"{name}-{index + 1}"
        for index, name in enumerate(names)
    ]
    on_gpu = torch.cuda.is_available() and chosen.backend == "torch"
    device = chosen.device or ("cuda" if on_gpu else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise click.UsageError(f"--device {device} cannot be used: {reason}") from error
    backend = Backend(chosen.backend, chosen.dtype, device, engine_dir)
    return {label: Model(one, backend) for label, one in zip(labels, found, strict=True)}


def _open_evaluation(
    models: "dict[str, Model]", protocol: "Protocol", store: Path, measured: _MeasureOptions
) -> "Evaluation":
    from encache.evaluate.extractors import load_clip, load_extractor
    from encache.evaluate.sampling import Evaluation
    from encache.evaluate.store import Store

    device = next(iter(models.values())).backend.device
    return Evaluation(
        models,
        protocol,
        Store(store),
        None
        if measured.extractor == "none"
        else load_extractor(measured.extractor, measured.extractor_weights, device),
        load_clip(measured.clip, device) if measured.clip else None,
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
