"""Reference trajectories: the full sampler's own latents, of pictures that are kept apart."""

import pytest
import torch

from encache.evaluate.fit import denoiser, run_plan
from encache.evaluate.store import Store
from encache.evaluate.trajectories import BATCH_SIZE, Pictures, Trajectories, split_prompts
from encache.runtime.jobs import Job, draw
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import make_plan
from encache.runtime.schedulers import make_scheduler

STEPS, SCALE = 5, 3.0
PROMPTS = ("red apple", "hot dog", "green pear")


@pytest.mark.parametrize("solver", ["ddim", "euler"])
def test_they_are_what_the_full_sampler_passes(pipeline, tmp_path, solver):
    ours = EncachePipeline.from_pipe(pipeline)
    ours.set_progress_bar_config(disable=True)
    ours.scheduler = make_scheduler(solver, ours.scheduler)
    trajectories = Trajectories(ours, "tiny", STEPS, SCALE, Store(tmp_path))
    pictures = Pictures(PROMPTS, 7, 3)
    [numbers] = pictures.batches
    latents = trajectories.latents(pictures, numbers)
    jobs = [Job(prompt, 7 + index) for index, prompt in enumerate(PROMPTS)]
    drawn = draw(ours, jobs, trajectories.settings, output_type="latent")
    # Stored in half the bits.
    torch.testing.assert_close(latents[-1], drawn, rtol=2e-3, atol=2e-3)
    # Run as a fit runs plans, every call's latents follow from the same rows.
    batch, denoise = trajectories.batch(pictures, numbers), denoiser(ours.engines, SCALE)
    full = make_plan(ours.scheduler, STEPS)
    run_plan(full, batch, denoise)
    samples = torch.tensor(full.samples)
    expected = torch.tensordot(samples, torch.stack(batch.history), 1)
    torch.testing.assert_close(latents, expected, rtol=2e-3, atol=2e-2)
    torch.testing.assert_close(batch.wanted(), latents)


def test_pictures_held_out_share_neither_prompt_nor_seed():
    names = [f"thing {number % 20}" for number in range(40)]  # each twice
    fitted, held_out = split_prompts(names, 64, 32)
    assert not {*fitted.prompts} & {*held_out.prompts}
    assert {*fitted.prompts, *held_out.prompts} == {*names}
    assert len(held_out.prompts) == 5
    seeds = [
        {job.seed for numbers in one.batches for job in one.jobs(numbers)}
        for one in (fitted, held_out)
    ]
    assert [len(one) for one in seeds] == [64, 32]
    assert not seeds[0] & seeds[1]


def test_a_single_prompt_is_held_out_by_its_seeds():
    fitted, held_out = split_prompts(["red apple"], 2 * BATCH_SIZE, 1)
    assert fitted.prompts == held_out.prompts == ("red apple",)
    assert fitted.first_seed + fitted.number <= held_out.first_seed
