"""Which ways to sample an evaluation compares, and with what."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from encache.command import FiniteFloat
from encache.model.spec import CUTS, DEFAULT_CUT, Cut
from encache.options import option
from encache.runtime.blend import BLENDS, DEFAULT_BLEND, Blend
from encache.runtime.options import plans_option, strides_option
from encache.runtime.schedulers import SCHEDULERS

if TYPE_CHECKING:
    from encache.evaluate.sampling import Model
    from encache.evaluate.settings import Protocol, Setting
    from encache.model.checkpoint import Checkpoint
    from encache.runtime.plan import Plan
    from encache.runtime.solver import Scheduler


#: Compared unless others are asked for.
DEFAULT_STRIDES = (3, 5, 10)


@dataclass(frozen=True)
class SettingOptions:
    """How they are sampled."""

    steps: int = option(type=click.IntRange(1), default=50)
    scheduler: str | None = option(
        type=click.Choice(tuple(SCHEDULERS)), help="Default: the model's own."
    )
    guidance_scale: float | None = option(
        type=FiniteFloat(), help="Default: the first model's own."
    )
    cuts: tuple[Cut, ...] = option(
        "--cut", type=click.Choice(CUTS), multiple=True, default=(DEFAULT_CUT,)
    )
    blends: tuple[Blend, ...] = option(
        "--blend", type=click.Choice(BLENDS), multiple=True, default=(DEFAULT_BLEND, "reuse")
    )
    strides: tuple[int, ...] = strides_option(DEFAULT_STRIDES)
    paper_key_calls: bool = option(
        is_flag=True, default=False, help="Also Faster Diffusion's list of key calls."
    )
    prior_noise: bool = option(is_flag=True, default=False, help="Also with prior noise.")
    plan_files: tuple[Path, ...] = plans_option()
    plain_steps: tuple[int, ...] = option(
        default=(),
        type=click.IntRange(1),
        multiple=True,
        help="Also the plain sampler with so many steps. Always: as many as each setting's "
        "arithmetic buys.",
    )
    reference_steps: int | None = option(
        type=click.IntRange(1),
        help="Measure errors against the plain sampler with so many steps, not against --steps.",
    )


@dataclass(frozen=True)
class Selection:
    """What is compared with what.

    Attributes:
        first: the first model's full sampler.
        reference: what errors are measured against.
        listed: all settings, each once.
        full_of: by model, the full sampler whose arithmetic is 1.
        opponents: of each cached setting, the plain sampler at equal arithmetic.
    """

    first: "Setting"
    reference: "Setting"
    listed: "list[Setting]"
    full_of: "dict[str, Setting]"
    opponents: "dict[Setting, Setting]"

    @classmethod
    def of(
        cls, models: "dict[str, Model]", protocol: "Protocol", sampling: SettingOptions
    ) -> "Selection":
        """All settings that the options ask for, each once.

        Raises:
            PlanError: a plan was fitted for something else.
        """
        from encache.evaluate.rows import plain_at_equal_arithmetic
        from encache.evaluate.settings import Setting, cached_settings, own_setting
        from encache.model.preset import UNSAID
        from encache.runtime.key_calls import paper_key_calls, strides_within

        trained_for = {
            label: own_setting(label, model.checkpoint)
            for label, model in models.items()
            if model.checkpoint.preset != UNSAID
        }
        # Weights that were trained for one plan are drawn by it; under another they mean little.
        solver, steps = sampling.scheduler or "", sampling.steps
        fulls = [Setting(one, solver, steps) for one in models if one not in trained_for]
        first = fulls[0]
        num_calls = models[first.model].plan(first).num_calls
        cached = cached_settings(
            fulls,
            sampling.cuts,
            sampling.blends,
            sampling.strides or strides_within(DEFAULT_STRIDES, num_calls),
            [paper_key_calls(num_calls)] if sampling.paper_key_calls else [],
            [False, True] if sampling.prior_noise else [False],
        )
        full_of = {full.model: full for full in fulls}
        full_of |= {
            label: full_of[_base_of(models[label].checkpoint, models) or first.model]
            for label in trained_for
        }
        cached += _fitted_settings(sampling.plan_files, models, first, protocol.guidance_scale)
        cached += trained_for.values()
        opponents = {
            one: plain_at_equal_arithmetic(models, protocol, one, full_of[one.model])
            for one in cached
        }
        reference = replace(first, steps=sampling.reference_steps or steps)
        asked = [replace(first, steps=count) for count in sampling.plain_steps]
        listed = dict.fromkeys([reference, *fulls, *asked, *opponents.values(), *cached])
        return cls(first, reference, list(listed), full_of, opponents)


def _fitted_settings(
    files: "Sequence[Path]", models: "dict[str, Model]", full: "Setting", guidance_scale: float
) -> "list[Setting]":
    """The full sampler by each plan of these files."""
    model = models[full.model]
    plans = read_fitting(
        files, model.checkpoint.fingerprint, model.scheduler(full), full.steps, guidance_scale
    )
    return [replace(full, fitted=plan) for plan in plans]


def read_fitting(
    files: Sequence[Path], model: str, scheduler: "Scheduler", steps: int, guidance_scale: float
) -> "list[Plan]":
    """The plans in these files, which must fit what is compared.

    Args:
        files: that encache-fit wrote.
        model: fingerprint.
        scheduler: the solver.
        steps: num_inference_steps.
        guidance_scale: of the run; one that is a little away is warned of.

    Raises:
        PlanError: a plan was fitted for something else.
    """
    from encache.runtime.planfile import check_fits, read_plans
    from encache.runtime.schedulers import full_config

    plans = []
    for fitted in (fitted for file in files for fitted in read_plans(file)):
        warning = check_fits(
            fitted.fitted_on,
            model=model,
            scheduler=full_config(scheduler),
            steps=steps,
            guidance_scale=guidance_scale,
        )
        if warning:
            click.echo(warning, err=True)
        plans.append(fitted.plan)
    return plans


def _base_of(trained: "Checkpoint", models: "dict[str, Model]") -> str | None:
    """The label of the model that weights were trained from, if it is there."""
    labels = [one for one, model in models.items() if model.checkpoint == trained.base]
    return labels[0] if labels else None
