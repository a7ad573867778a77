"""What executes plans: the sampling loop with its buffers, as one CUDA graph where that works."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from encache.errors import EncacheError
from encache.runtime.engines import Engines
from encache.runtime.guidance import make_guide
from encache.runtime.plan import Plan
from encache.runtime.replay import Replay
from encache.runtime.sampler import OnFinished, Sampling


class Guidance(NamedTuple):
    """How the branches with and without prompt are combined.

    Attributes:
        scale: of classifier-free guidance; None is without.
        rescale: Lin et al. (arXiv 2305.08891, section 3.4).
    """

    scale: float | None
    rescale: float = 0.0


class Executor:
    """Executes plans over engines.

    On a GPU it keeps the buffers and the CUDA graph of its last run, for the next one like it:
    there, one thread at a time may use it.
    """

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._kept: tuple[object, tuple[Sampling, Replay | None]] | None = None

    def run(
        self,
        plan: Plan,
        noise: Tensor,
        conditions: Mapping[str, Tensor],
        guidance: Guidance,
        on_finished: OnFinished,
        watched: bool,
    ) -> Tensor:
        """Latents [n, C, h, w] of a plan.

        Args:
            plan: what to run.
            noise: z [n, C, h, w], float32.
            conditions: by name [G, n, ...], those without prompt first.
            guidance: over G.
            on_finished: told which calls are done; it may raise to stop.
            watched: whether it must be told while they are, which a CUDA graph cannot.

        Raises:
            EncacheError: the latents are not finite.
        """
        sampling, replay = self._prepare(plan, noise, conditions, guidance)
        rows = {name: one.flatten(0, 1) for name, one in conditions.items()}
        if replay and not watched:
            latents = replay(noise, rows)
            on_finished(range(plan.num_calls), lambda _: latents)
        else:
            latents = sampling.run(noise, rows, on_finished)
        if not latents.isfinite().all():
            raise EncacheError(_explain_not_finite(conditions["text"], sampling))
        return latents

    def _prepare(
        self, plan: Plan, noise: Tensor, conditions: Mapping[str, Tensor], guidance: Guidance
    ) -> tuple[Sampling, Replay | None]:
        """A plan's buffers, and its CUDA graph where one is possible; kept on a GPU."""
        shapes = {name: one.shape for name, one in conditions.items()}
        key = (plan, noise.shape, *shapes.items(), guidance)
        if self._kept and self._kept[0] == key:
            return self._kept[1]
        self._kept = None  # frees its memory first
        num_guided = len(conditions["text"])
        sampling = Sampling(plan, self._engines, noise.shape, num_guided, make_guide(*guidance))
        replay = Replay(sampling.run) if self._engines.capturable else None
        if replay or self._engines.device.type == "cuda":
            self._kept = (key, (sampling, replay))
        return sampling, replay


def _explain_not_finite(text: Tensor, sampling: Sampling) -> str:
    """Where numbers that are not finite began, and what to try."""
    remedy = (
        "Try fp32, or a lower guidance scale; if both fail, the weights or a fitted plan are "
        "damaged."
    )
    if not text.isfinite().all():
        return f"The text encoder gives numbers that are not finite. {remedy}"
    call = sampling.first_broken_call()
    where = "the solver's latents" if call is None else f"call {call} of the UNet"
    return f"The picture would be black: {where} is not finite. {remedy}"
