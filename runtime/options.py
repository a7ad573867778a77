"""The options by which commands say how to sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from encache.command import FiniteFloat, typed_options
from encache.contract.library import BACKENDS, TORCH_BACKENDS
from encache.contract.manifest import MANIFEST
from encache.export.options import ModelOptions
from encache.model.preset import Preset
from encache.model.spec import Cut
from encache.options import names_of, option
from encache.runtime.blend import BLENDS, DEFAULT_BLEND, DEFAULT_STRIDE, Blend
from encache.runtime.key_calls import NAMED_KEY_CALLS
from encache.runtime.schedulers import SCHEDULERS
from encache.runtime.settings import DEFAULT_STEPS

if TYPE_CHECKING:
    from encache.runtime.planfile import FittedPlan

#: Listed, or the name of a published list.
KeyCalls = tuple[int, ...] | str


def parse_key_calls(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> KeyCalls | None:
    """Key calls as they are typed: 0,5,10, or the name of a published list."""
    if value is None or value in NAMED_KEY_CALLS:
        return value
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a list like 0,5,10, nor one of {', '.join(NAMED_KEY_CALLS)}."
        ) from None


@dataclass(frozen=True)
class SolverOptions:
    """What the full sampler does; what is not said is the model's own."""

    steps: int | None = option(
        "--steps",
        "--num-inference-steps",
        type=click.IntRange(1),
        show_default=f"the weights' own, or {DEFAULT_STEPS}",
    )
    scheduler: str | None = option(
        type=click.Choice(tuple(SCHEDULERS)), help="Default: the model's own."
    )
    guidance_scale: float | None = option(
        type=FiniteFloat(), help="1 or less turns it off. Default: the model's own."
    )


@dataclass(frozen=True)
class SamplingOptions(SolverOptions):
    """How pictures are sampled; what is not said is the model's own."""

    stride: int | None = option(
        type=click.IntRange(1),
        help="Every stride-th call is a key call; 1 samples in full. Default: the weights' own, "
        f"or {DEFAULT_STRIDE}, or the number of calls if that is less.",
    )
    key_calls: KeyCalls | None = option(
        callback=parse_key_calls,
        help="Key calls instead, as 0,5,10, or 'paper' for Faster Diffusion's list; 'if-1' and "
        "'if-2' for DeepFloyd-IF's.",
    )
    blend: Blend | None = option(
        type=click.Choice(BLENDS), show_default=f"the weights' own, or {DEFAULT_BLEND}"
    )
    prior_noise: bool | None = option(
        "--prior-noise/--no-prior-noise",
        help="Inject prior noise as Faster Diffusion does. Default: as the weights want it, or "
        "not.",
    )

    plan_file: Path | None = option(
        "--plan",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Plans that encache-fit fitted to this model, in place of a stride and a blend: of "
        "several the cheapest one of 48 dB, or the nearest. Default: plans.json in the model's "
        "folder.",
    )
    quality: float | None = option(
        type=FiniteFloat(0), help="Of the plans the cheapest one with so many dB PSNR."
    )
    budget: float | None = option(
        type=FiniteFloat(0, 1),
        help="Of the plans the best one for this share of the full sampler's rows.",
    )

    @property
    def says_how(self) -> bool:
        """Whether anything but guidance is said of the way to sample."""
        said = (self.steps, self.scheduler, self.stride, self.key_calls, self.blend)
        return any(one is not None for one in (*said, self.prior_noise))

    def fitted(self, own_plans: Path | None) -> "FittedPlan | None":
        """The plan that --plan, --quality and --budget choose; None where none of them is said.

        Args:
            own_plans: the model's own file, if it has one.

        Raises:
            click.UsageError: an option means nothing beside another, or there are no plans.
            PlanError: the file holds no such plan.
        """
        if self.plan_file is None and self.quality is None and self.budget is None:
            return None
        path = self.plan_file or own_plans
        if path is None:
            raise click.UsageError(
                "--quality and --budget choose from plans, and this model comes with none: give "
                "--plan, a file that encache-fit has written."
            )
        for name in typed_options({"stride", "key_calls", "blend", "prior_noise"}):
            raise click.UsageError(f"{name} means nothing beside a plan, which says it all.")
        from encache.runtime.planfile import choose_plan, read_plans

        return choose_plan(read_plans(path), quality=self.quality, budget=self.budget)

    def wished(self, cut: Cut) -> Preset:
        """What is said, apart from key calls, which depend on the scheduler's number of calls."""
        return Preset(
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            stride=self.stride,
            blend=self.blend,
            prior_noise=self.prior_noise,
            cut=cut,
        )


@dataclass(frozen=True)
class EnginesOptions:
    """What runs the model, and where its engines are."""

    backend: str = option(
        type=click.Choice((*TORCH_BACKENDS, *BACKENDS)),
        default="onnxruntime",
        help="torch.compile takes minutes before its first picture, and pays for many of one size.",
    )
    engine_dir: Path = option(
        type=click.Path(path_type=Path),
        default=Path("engines"),
        help="Where engines are found, or built on first use; or one engine folder.",
    )

    @property
    def one_folder(self) -> Path | None:
        """The folder itself, if it is one engine folder."""
        return self.engine_dir if (self.engine_dir / MANIFEST).is_file() else None

    def refuse_idle_options(self, sampling: SamplingOptions, *further: str) -> None:
        """Refuse options that another typed one makes meaningless; they are never ignored.

        Args:
            sampling: how pictures are sampled.
            further: parameters of the running command that an engine folder also decides.
        """
        # One engine folder is one model at one cut, and holds no PyTorch weights.
        decided = names_of(ModelOptions) | {"cut", "dtype", "backend"}
        for name in typed_options({*decided, *further}) if self.one_folder else ():
            raise click.UsageError(
                f"{self.one_folder} is one engine folder, so {name} cannot be honoured: leave it "
                "out, or give --engine-dir the folder's parent."
            )
        if sampling.key_calls and [*typed_options({"stride"})]:
            raise click.UsageError("--stride means nothing beside --key-calls.")
        if self.backend in TORCH_BACKENDS and [*typed_options({"engine_dir"})]:
            raise click.UsageError(f"--engine-dir means nothing with --backend {self.backend}.")


def strides_option(defaults: Sequence[int]) -> Any:
    """Several distances of key calls; without one, those of the defaults that the calls allow."""
    return option(
        "--stride",
        default=(),
        type=click.IntRange(2),
        multiple=True,
        help=f"Repeatable. Default: {', '.join(map(str, defaults))}, as far as the calls allow.",
    )


def plans_option() -> Any:
    """Files of fitted plans that are compared with everything else."""
    return option(
        "--plan",
        default=(),
        multiple=True,
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Also every plan in this file, which encache-fit fitted to the (first) model.",
    )
