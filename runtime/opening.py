"""What a command is to draw with: an engine folder or a checkpoint, its settings and its plan."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from encache.contract.dtypes import default_dtype
from encache.contract.library import TENSORRT_BACKENDS, TORCH_BACKENDS
from encache.contract.manifest import PLANS, Manifest, read_manifest, refuse_denoiser_alone
from encache.contract.target import DECODE_CALLS, Target, exactly, make_target, most_rows
from encache.errors import CheckpointError
from encache.export.options import EngineOptions, ModelOptions, SizeOptions, refuse_without_cut
from encache.model.checkpoint import Checkpoint
from encache.model.preset import UNSAID
from encache.model.spec import NO_CUT, Cut
from encache.runtime.options import KeyCalls, SamplingOptions
from encache.runtime.settings import Policy, Settings, resolve

if TYPE_CHECKING:
    from encache.runtime.pipeline import EncachePipeline
    from encache.runtime.plan import Plan
    from encache.runtime.planfile import FittedPlan
    from encache.runtime.solver import Scheduler


@dataclass(frozen=True)
class Opening:
    """What is to be opened: an engine folder, or a checkpoint on a backend."""

    manifest: Manifest | None
    checkpoint: Checkpoint | None
    cut: Cut
    dtype: str
    backend: str
    engine_dir: Path

    @classmethod
    def of(
        cls,
        one_folder: Path | None,
        model: ModelOptions,
        engine: EngineOptions,
        backend: str,
        engine_dir: Path,
    ) -> "Opening":
        """What the options name, looked at without loading it.

        Raises:
            EncacheError: it is not there, or cannot be opened so.
        """
        if one_folder:
            manifest = read_manifest(one_folder)
            refuse_denoiser_alone(one_folder, manifest)
            identity = manifest.identity
            backend = identity.backend
            return cls(manifest, None, identity.cut, identity.dtype, backend, engine_dir)
        checkpoint = model.find()
        if checkpoint.folder is None and backend in TENSORRT_BACKENDS:
            raise CheckpointError(f"{model.ckpt} alone does not say what to compile: add --base.")
        dtype = engine.dtype or default_dtype(backend)
        return cls(None, checkpoint, engine.cut or checkpoint.cut, dtype, backend, engine_dir)

    @property
    def model(self) -> Checkpoint | Manifest:
        """Either knows the model's name, preset and guidance."""
        found = self.manifest or self.checkpoint
        assert found
        return found

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        if self.manifest:
            return self.manifest.identity.model
        assert self.checkpoint
        return self.checkpoint.fingerprint

    @property
    def own_plans(self) -> Path | None:
        """The file of fitted plans that lies with the model, if one does."""
        folder = self.checkpoint.folder if self.checkpoint else self.engine_dir
        return folder / PLANS if folder and (folder / PLANS).is_file() else None

    def scheduler(self) -> "Scheduler":
        """The model's own."""
        from encache.export.build import Request, find_engines
        from encache.model.loading import load_pipeline, read_outline
        from encache.runtime.backends import load_scheduler

        if self.manifest:
            return load_scheduler(self.engine_dir, self.manifest)
        assert self.checkpoint
        if self.checkpoint.folder:
            return read_outline(self.checkpoint).scheduler
        # A single file alone says nothing until it is loaded; what was exported from it does.
        if self.backend not in TORCH_BACKENDS:
            request = Request(self.checkpoint, self.cut, self.dtype, self.backend)
            if folder := find_engines(request, self.engine_dir):
                return load_scheduler(folder, read_manifest(folder))
        return load_pipeline(self.checkpoint).scheduler

    def open(self, run: "Run", size: SizeOptions) -> "EncachePipeline":
        """Open it, building engines that are missing: of TensorRT's what the run needs, no more."""
        target = None
        if self.checkpoint and self.backend in TENSORRT_BACKENDS:
            rows = (len(run.batches[-1]), len(run.batches[0]))
            target = make_target(
                self.checkpoint,
                self.backend,
                self.cut,
                rows=(rows[0] * run.settings.rows, rows[1] * run.settings.rows),
                decode_calls=run.plan.longest_decode,
                height=exactly(size.height),
                width=exactly(size.width),
            )
        return self._open(target)

    def _open(self, target: Target | None) -> "EncachePipeline":
        from encache.runtime.pipeline import EncachePipeline

        if self.checkpoint is None:
            return EncachePipeline.from_engines(self.engine_dir)
        if (self.engine_dir / "model_index.json").exists():  # a folder that lost its manifest
            read_manifest(self.engine_dir)
        return EncachePipeline.from_checkpoint(
            self.checkpoint,
            cut=self.cut,
            backend=self.backend,
            dtype=self.dtype,
            target=target,
            engine_dir=self.engine_dir,
            report=lambda line: click.echo(line, err=True),
        )


@dataclass(frozen=True)
class Run:
    """How pictures are sampled, in which batches of seeds, and with which plan."""

    settings: Settings
    solver: "Scheduler"
    batches: list[Sequence[int]]
    plan: "Plan"
    max_decode_batch: int | None


def resolve_run(
    opening: Opening,
    sampling: SamplingOptions,
    size: SizeOptions,
    seeds: Sequence[int],
    batch_size: int,
    max_decode_batch: int | None,
) -> Run:
    """Settle what was left open, and refuse what does not go together.

    Args:
        opening, sampling, size: what was asked for.
        seeds: of the pictures of each prompt.
        batch_size: most pictures at once; where engines were compiled for fewer, these.
        max_decode_batch: most rows in one run of the decoder.
    """
    from encache.runtime.plan import make_plan
    from encache.runtime.schedulers import make_scheduler

    refuse_without_cut(opening.cut, "max_decode_batch")
    own_plans, model = opening.own_plans, opening.model
    fitted = sampling.fitted(own_plans) or _default_plan(own_plans, opening, sampling)
    preset = fitted.fitted_on.preset if fitted else model.preset
    solver = opening.scheduler()
    if sampling.scheduler:
        solver = make_scheduler(sampling.scheduler, solver)
    elif fitted:
        solver = _solver_of(fitted, solver)
    scale = fitted.fitted_on.guidance_scale if fitted else model.guidance_scale
    settings = resolve(sampling.wished(opening.cut), preset, scale)
    if fitted:
        settings = _by_plan(settings, solver, opening, fitted)
    if sampling.key_calls:
        listed = _resolve_key_calls(sampling.key_calls, solver, settings.steps)
        settings = replace(settings, policy=replace(settings.policy, stride=None, key_calls=listed))
    target = opening.manifest.identity.target if opening.manifest else None
    if target:
        batch_size = min(batch_size, max(1, target.rows[1] // settings.rows))
    batches = _split(seeds, batch_size)
    if target:
        for count in {len(batch) for batch in batches}:
            rows = count * settings.rows
            target.refuse_beyond(rows=rows, height=size.height, width=size.width)
    rows_per_call = len(batches[0]) * settings.rows
    calls = _most_calls(target, opening.backend, opening.cut)
    most = most_rows(calls, rows_per_call, max_decode_batch)
    plan = make_plan(
        solver,
        settings.steps,
        settings.policy,
        max_decode_batch=most,
        rows_per_call=rows_per_call,
    )
    return Run(settings, solver, batches, plan, most)


def _split(seeds: Sequence[int], size: int) -> list[Sequence[int]]:
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def _most_calls(target: Target | None, backend: str, cut: Cut) -> int | None:
    """Most calls in a run of the decoder that is there or would be compiled; None if any number."""
    if target:
        return target.decode_calls
    return DECODE_CALLS if backend in TENSORRT_BACKENDS and cut != NO_CUT else None


def _resolve_key_calls(key_calls: KeyCalls, scheduler: "Scheduler", steps: int) -> tuple[int, ...]:
    from encache.runtime.key_calls import listed_key_calls
    from encache.runtime.solver import count_calls

    return listed_key_calls(key_calls, count_calls(scheduler, steps))


def _solver_of(fitted: "FittedPlan", own: "Scheduler") -> "Scheduler":
    """The solver that a plan was fitted with: the model's own, or one that --scheduler names.

    Its file says which; what it says is not built, but compared with these.
    """
    from encache.runtime.schedulers import SCHEDULERS, full_config, make_scheduler

    if not fitted.fitted_on.differences(full_config(own)):
        return own
    wanted = json.loads(fitted.fitted_on.scheduler).get("_class_name")
    named = [name for name, (class_name, _) in SCHEDULERS.items() if class_name == wanted]
    return make_scheduler(named[0], own) if named else own


def _default_plan(
    own_plans: Path | None, opening: Opening, sampling: SamplingOptions
) -> "FittedPlan | None":
    """The cheapest of the model's own plans that is good, if nothing else is asked for."""
    from encache.runtime.planfile import DEFAULT_QUALITY, read_plans

    if own_plans is None or sampling.says_how or opening.cut != NO_CUT:
        return None
    if opening.model.preset != UNSAID:
        return None
    good = (one for one in read_plans(own_plans) if one.measured.psnr >= DEFAULT_QUALITY)
    cheapest, scale = next(good, None), sampling.guidance_scale
    if cheapest is None or cheapest.fitted_on.model != opening.fingerprint:
        return None
    return cheapest if scale is None or cheapest.fitted_on.near(scale) else None


def _by_plan(
    settings: Settings, solver: "Scheduler", opening: Opening, fitted: "FittedPlan"
) -> Settings:
    """The same settings with a fitted plan; a guidance a little away is warned of.

    Raises:
        PlanError: it was fitted for something else.
    """
    from encache.runtime.planfile import check_fits
    from encache.runtime.schedulers import full_config

    warning = check_fits(
        fitted.fitted_on,
        model=opening.fingerprint,
        scheduler=full_config(solver),
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
    )
    if warning:
        click.echo(warning, err=True)
    return replace(settings, policy=Policy(cut=opening.cut, plan=fitted.plan))
