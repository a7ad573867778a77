"""The solvers that the command line names; in Python any deterministic scheduler works."""

import inspect
import math
from typing import Any

from encache.errors import PlanError

#: Option name -> diffusers class and what its config needs on top of the model's.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Latents are not bounded by 1, and clipping is not linear; Stable Diffusion turns it off too.
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsolver++single": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}

#: Of a schedule that ends without signal, which not every solver can follow.
_ZERO_SNR = "rescale_betas_zero_snr"


def full_config(scheduler: Any) -> dict[str, Any]:
    """Every number that decides what a scheduler does, as JSON can hold it.

    diffusers also notes which of them its config file had left out, in no order: from_config would
    leave them out again. JSON has no infinity, which stands only where a bound is none by default.
    """
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    return {
        name: value.tolist() if hasattr(value, "tolist") else value
        for name, value in sorted(config.items())
        if name != "_use_default_values" and not (isinstance(value, float) and math.isinf(value))
    }


def make_scheduler(name: str, model_scheduler: Any) -> Any:
    """The named solver on the noise schedule of the model's own scheduler.

    Raises:
        PlanError: the name is not in `SCHEDULERS`, or the model's schedule not for this solver.
    """
    import diffusers

    if name not in SCHEDULERS:
        raise PlanError(f"There is no scheduler {name!r}. Choose one of {', '.join(SCHEDULERS)}.")
    class_name, options = SCHEDULERS[name]
    scheduler_class = getattr(diffusers, class_name)
    known = inspect.signature(scheduler_class.__init__).parameters
    if model_scheduler.config.get(_ZERO_SNR) and _ZERO_SNR not in known:
        raise PlanError(
            f"{name} cannot follow this model's schedule, which ends without signal. Choose ddim, "
            "dpmsolver++, unipc or euler."
        )
    return scheduler_class.from_config(model_scheduler.config, **options)
