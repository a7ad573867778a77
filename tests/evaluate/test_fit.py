"""Plans fitted by least squares: the rule without freedom, the truth where it is linear."""

import pytest
import torch

from encache.errors import PlanError
from encache.evaluate.fit import Batch, combine, denoiser, errors_of, fit_weights, run_plan, widen
from encache.runtime.engines import TorchEngines
from encache.runtime.guidance import make_guide
from encache.runtime.plan import make_plan
from encache.runtime.sampler import Sampling
from encache.runtime.settings import Policy
from tests.conftest import TEXT_WIDTH, tiny_unet
from tests.runtime.solvers import NAMES, solver

STEPS = 12
SCALE = 3.0


def rule_of(name="ddim", stride=4, branches="apart", blend="extrapolate"):
    rule = make_plan(solver(name), STEPS, Policy(stride, blend=blend))
    return rule, widen(rule, [branches] * rule.num_evaluations, SCALE)


def batches_of(denoise, name="ddim", number=6, seed=0, conditions=None):
    """Pictures and the full sampler's latents, by the table itself."""
    full = make_plan(solver(name), STEPS)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(number // 2):
        noise = torch.randn(2, 4, 8, 8, generator=generator)
        told = conditions(generator) if conditions else {"text": torch.zeros(4, 1)}
        history = [noise]
        for step in full.steps:
            latents = torch.tensordot(
                torch.tensor(step.row[: len(history)]), torch.stack(history), 1
            )
            history.extend(denoise(latents, torch.tensor([step.timestep]), told, "guided"))
        wanted = torch.tensordot(torch.tensor(full.samples), torch.stack(history), 1)
        batches.append(Batch(noise, told, lambda wanted=wanted: wanted))
    return batches


def linear_model(latents, timestep, conditions, branches):
    """Predictions that are a fixed linear map of the latents, with three eigenvalues."""
    strengths = torch.tensor([0.2, 0.5, 0.8]).repeat(100)[: latents[0].numel()]
    conditional = strengths.view(latents.shape[1:]) * latents
    guided = conditional + (SCALE - 1) * 0.3 * latents
    columns = {"guided": [guided], "apart": [guided, 0.3 * latents], "conditional": [conditional]}
    return torch.stack(columns[branches])


@pytest.fixture(scope="module")
def model():
    engines = TorchEngines(tiny_unet(), "none")

    def conditions(generator):
        text = torch.randn(2, 16, TEXT_WIDTH, generator=generator)
        return {"text": torch.cat([torch.zeros_like(text), text])}

    return engines, denoiser(engines, SCALE), conditions


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_without_freedom_is_its_rule(name, model):
    """Through the sampler itself, which runs both."""
    engines, denoise, conditions = model
    rule, wide = rule_of(name)
    batches = batches_of(denoise, name, 2, conditions=conditions)
    unfitted = fit_weights(wide, batches, denoise, ridges=())
    assert unfitted.num_evaluations == rule.num_evaluations
    assert len(unfitted.columns) == 1 + 2 * rule.num_evaluations
    [batch] = batches

    def sample(plan):
        sampling = Sampling(plan, engines, batch.noise.shape, 2, make_guide(SCALE))
        return sampling.run(batch.noise, batch.conditions)

    expected = sample(rule)
    torch.testing.assert_close(sample(unfitted), expected, rtol=1e-4, atol=1e-4)
    # The fit's own loop is the sampler's.
    torch.testing.assert_close(run_plan(unfitted, batch, denoise), expected, rtol=1e-4, atol=1e-4)


def test_the_sampler_runs_one_branch_alone(model):
    engines, denoise, conditions = model
    rule, _ = rule_of()
    plan = widen(rule, ["apart", "conditional", "apart"], SCALE)
    [batch] = batches_of(denoise, number=2, conditions=conditions)
    sampling = Sampling(plan, engines, batch.noise.shape, 2, make_guide(SCALE))
    ours = sampling.run(batch.noise, batch.conditions)
    torch.testing.assert_close(ours, run_plan(plan, batch, denoise), rtol=1e-4, atol=1e-4)
    # What ran alone was told the prompt.
    told = {name: one.chunk(2)[1] for name, one in batch.conditions.items()}
    latents = combine(plan.steps[1].row, batch.history[:3])
    predicted = engines.denoise(latents, torch.tensor([plan.steps[1].timestep]), told)
    torch.testing.assert_close(batch.history[3], predicted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("branches", ["guided", "apart"])
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "euler"])
def test_a_linear_model_is_solved_exactly(name, branches):
    """Four evaluations span all that a map with three eigenvalues can make of the noise."""
    rule, wide = rule_of(name, 3, branches)
    batches = batches_of(linear_model, name)
    held_out = batches_of(linear_model, name, seed=1)
    before = errors_of(rule, held_out, linear_model)
    assert before.min() > 1e-4
    fitted = fit_weights(wide, batches, linear_model, ridges=(1e-13,))
    assert errors_of(fitted, held_out, linear_model).max() < 1e-7


def test_few_pictures_of_a_network_do_no_harm(model):
    _, denoise, conditions = model
    rule, wide = rule_of()
    batches = batches_of(denoise, number=4, conditions=conditions)
    held_out = batches_of(denoise, number=8, seed=1, conditions=conditions)
    fitted = fit_weights(wide, batches, denoise)
    error = errors_of(fitted, held_out, denoise).mean()
    assert error < errors_of(rule, held_out, denoise).mean()


def test_a_branch_that_is_left_out_takes_the_latest_contrast():
    """With a model whose contrast does not change, nothing is lost."""
    rule = make_plan(solver("ddim"), STEPS, Policy(3, blend="reuse"))

    def constant(latents, timestep, conditions, branches):
        contrast = torch.full_like(latents, 0.5)
        conditional = torch.sin(latents)
        guided = conditional + (SCALE - 1) * contrast
        columns = {"guided": [guided], "apart": [guided, contrast], "conditional": [conditional]}
        return torch.stack(columns[branches])

    [batch] = batches_of(constant, number=2)
    wide = widen(rule, ["apart", "conditional", "conditional", "apart"], SCALE)
    assert wide.count_rows(2) == 6
    torch.testing.assert_close(
        run_plan(wide, batch, constant), run_plan(rule, batch, constant), rtol=1e-5, atol=1e-5
    )


def test_a_rule_that_looks_ahead_is_refused():
    rule = make_plan(solver("ddim"), STEPS, Policy(4, blend="interpolate"))
    with pytest.raises(PlanError, match="starts from reuse or extrapolate"):
        widen(rule, ["apart"] * rule.num_evaluations, SCALE)
