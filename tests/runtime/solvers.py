"""The solvers under test, made as the command line makes them."""

from encache.runtime.schedulers import SCHEDULERS, make_scheduler
from tests.conftest import stable_diffusion_scheduler

NAMES = tuple(SCHEDULERS)


def solver(name, **changes):
    return make_scheduler(name, stable_diffusion_scheduler(**changes))
