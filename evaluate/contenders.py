"""Everything that draws pictures in the benchmark: this project, PyTorch alone, and its peers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import cycle, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from encache.errors import EncacheError
from encache.evaluate.costs import gflop_of, steps_within
from encache.model.arithmetic import Arithmetic, count_arithmetic
from encache.model.spec import CUTS, NO_CUT, Cut, ImageSpec, rows_per_picture
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.plan import make_plan
from encache.runtime.settings import Policy, Settings
from encache.runtime.solver import count_calls

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

#: Draws pictures [n, 3, H, W] in [0, 1] of a prompt from noise [n, 4, h, w].
Draw = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to draw.

    Attributes:
        backend: what runs the UNet: "diffusers", with what is added to it, or an engine backend.
        sampling: how often, as a user would say it.
        device: where it runs.
        draw: see `Draw`.
        gflop: of the UNet per picture, counted; None where a peer changes what is computed.
        pipeline, call: for the time spent in each part, where engines are run.
        patch: puts a peer's changes in place, and back.
    """

    backend: str
    sampling: str
    device: torch.device
    draw: Draw
    gflop: float | None = None
    pipeline: EncachePipeline | None = None
    call: dict[str, Any] | None = None
    patch: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Task:
    """What all contenders draw.

    Attributes:
        prompts: in turn, one for all pictures of a batch.
        steps: of the full sampler.
        guidance_scale: classifier-free guidance.
        height, width: in pixels; None is the model's own.
        policies: each way to cache by name, such as Policy(stride=5); the cut is the engines'.
        negative_prompt: one for all.
    """

    prompts: tuple[str, ...]
    steps: int
    guidance_scale: float
    height: int | None
    width: int | None
    policies: Mapping[str, Policy]
    negative_prompt: str | None = None

    @property
    def call(self) -> dict[str, Any]:
        """Arguments that all share."""
        return {
            "negative_prompt": self.negative_prompt,
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
            "output_type": "pt",
        }

    @property
    def facts(self) -> dict[str, Any]:
        """As a report holds it."""
        policies = {
            name: {**policy.arguments, "plan": policy.plan and policy.plan.hash()}
            for name, policy in self.policies.items()
        }
        return {**asdict(self), "policies": policies}

    @property
    def rows(self) -> int:
        """Rows of the UNet per picture."""
        return rows_per_picture(self.guidance_scale)

    def draw_inputs(
        self, pipeline: "StableDiffusionPipeline", batch: int, seeds: Sequence[int]
    ) -> list[tuple[str, Tensor]]:
        """A prompt and unit noise [batch, 4, h, w] of each seed, as the pipeline computes."""
        unet = pipeline.unet
        shape = (batch, unet.config.in_channels, *self.latent_size(pipeline))
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        noises = (torch.randn(shape, generator=one) for one in generators)
        noises_there = (noise.to(unet.device, unet.dtype) for noise in noises)
        return list(zip(cycle(self.prompts), noises_there, strict=False))

    def latent_size(self, pipeline: "StableDiffusionPipeline") -> tuple[int, int]:
        """Latent height and width."""
        spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
        return spec.latent_size(self.height, self.width)


@dataclass(frozen=True)
class Trained:
    """Weights of the same model that were trained for a plan, and how to open them on a backend."""

    settings: Settings
    cut: Cut
    open: Callable[[str], EncachePipeline]


def assemble(
    pipeline: "StableDiffusionPipeline",
    open_backend: Callable[[str, Cut], EncachePipeline],
    backends: Sequence[str],
    cuts: Sequence[Cut],
    task: Task,
    compiling: bool,
    trained: Trained | None = None,
) -> tuple[list[Contender], dict[str, str]]:
    """All contenders, the full sampler of diffusers first, and of what is left out the reason.

    Args:
        pipeline: the undivided model.
        open_backend: opens the same model on a backend at a cut.
        backends, cuts: every pair is tried with every policy.
        task: what to draw.
        compiling: also try torch.compile.
        trained: other weights, which are added on every backend.
    """
    length = pipeline.tokenizer.model_max_length
    size = task.latent_size(pipeline)
    all_cuts = {*cuts, *((trained.cut,) if trained else ())}
    arithmetic = {cut: count_arithmetic(pipeline.unet, cut, *size, length) for cut in all_cuts}
    contenders = [plain(pipeline, task, arithmetic[cuts[0]].full)]
    if compiling:
        contenders.append(compiled(pipeline, contenders[0]))
    installed, absent = peers(pipeline, task)
    contenders += installed
    missing: dict[str, str] = {}
    for backend in backends:
        pipelines = {}
        for cut in cuts:
            try:
                pipelines[cut] = open_backend(backend, cut)
            except EncacheError as error:
                missing[f"{backend}, cut {cut}"] = str(error)
        if pipelines:
            contenders += cached(pipelines, task, arithmetic)
        if trained:
            try:
                cost = arithmetic[trained.cut]
                contenders.append(trained_contender(backend, trained, task, cost))
            except EncacheError as error:
                missing[f"{backend}, trained weights"] = str(error)
    return contenders, {**absent, **missing}


def cached(
    pipelines: Mapping[Cut, EncachePipeline], task: Task, arithmetic: Mapping[Cut, Arithmetic]
) -> Iterator[Contender]:
    """This project on one backend: the full sampler, every policy at every cut, and fewer steps.

    The fewer steps are as many as each policy's arithmetic buys.
    """
    fewer = {task.steps}
    for (cut, pipeline), (name, policy) in product(pipelines.items(), task.policies.items()):
        if policy.plan and cut != NO_CUT:
            continue
        plan = make_plan(pipeline.scheduler, task.steps, replace(policy, cut=cut))
        gflop = gflop_of(plan, arithmetic[cut], 1)
        fewer.add(steps_within(pipeline.scheduler, task.steps, gflop, arithmetic[cut]))
        call = {**task.call, "num_inference_steps": task.steps, **policy.arguments}
        yield _of(pipeline, f"cut {cut}, {name}", call, gflop * task.rows)
    cut = max(pipelines, key=lambda one: (one == NO_CUT, CUTS.index(one)))  # in as few engines
    for steps in sorted(fewer, reverse=True):
        call = {**task.call, "num_inference_steps": steps, "stride": 1}
        yield _of(pipelines[cut], f"{steps} steps", call, steps * arithmetic[cut].full * task.rows)


def trained_contender(
    backend: str, trained: Trained, task: Task, arithmetic: Arithmetic
) -> Contender:
    """Weights that were trained for a plan, sampled by it."""
    pipeline, settings = trained.open(backend), trained.settings
    plan = make_plan(pipeline.scheduler, settings.steps, settings.policy)
    name = f"trained for {plan.num_evaluations} of {plan.num_calls} calls"
    gflop = gflop_of(plan, arithmetic, settings.rows)
    return _of(pipeline, name, {**task.call, **settings.arguments}, gflop)


def comparison(
    full: "StableDiffusionPipeline",
    pipelines: Sequence[EncachePipeline],
    settings: Settings,
    arithmetic: Arithmetic,
    task: Task,
    **limits: Any,
) -> list[Contender]:
    """The full sampler, one plan on every pipeline, and as many full steps as that plan costs.

    Args:
        full: the undivided model, or the one that its weights were trained from.
        pipelines: run the plan.
        settings: how they sample.
        arithmetic: of one row of one call.
        task: what the full sampler draws; its policies do not count.
        limits: further arguments of the pipelines.
    """
    plan = make_plan(pipelines[0].scheduler, settings.steps, settings.policy)
    gflop = gflop_of(plan, arithmetic, settings.rows)
    steps = steps_within(full.scheduler, task.steps, gflop / task.rows, arithmetic)
    call = {**task.call, **settings.arguments, **limits}
    name = f"{plan.num_evaluations} of {plan.num_calls} calls"
    return [
        plain(full, task, arithmetic.full),
        *(_of(one, name, call, gflop) for one in pipelines),
        plain(full, replace(task, steps=steps), arithmetic.full),
    ]


def _of(pipeline: EncachePipeline, sampling: str, call: dict[str, Any], gflop: float) -> Contender:
    """A contender with a pipeline of its own, which keeps the buffers and graph of its plan."""
    own = pipeline.with_parts()
    own.set_progress_bar_config(disable=True)
    device = own.engines.device
    return Contender(own.engines.name, sampling, device, _drawer(own, call), gflop, own, call)


def plain(pipeline: "StableDiffusionPipeline", task: Task, gflop: float) -> Contender:
    """diffusers as it is; `gflop` is of one row of one call."""
    call = {**task.call, "num_inference_steps": task.steps}
    gflop *= count_calls(pipeline.scheduler, task.steps) * task.rows
    device, draw = pipeline.unet.device, _drawer(pipeline, call)
    return Contender("diffusers", f"{task.steps} steps", device, draw, gflop)


def compiled(pipeline: "StableDiffusionPipeline", full: Contender) -> Contender:
    """The same with torch.compile, which is what PyTorch's users reach for first.

    UNet and image decoder are compiled, as diffusers' guide has it, with CUDA graphs on a GPU.
    """
    replayed = torch.compile(pipeline.unet.forward, mode="reduce-overhead")
    decode = torch.compile(pipeline.vae.decode)

    def forward(*arguments: Any, **options: Any) -> Any:
        # The next replay writes over it, and a solver may still want it.
        return tree_map(torch.clone, replayed(*arguments, **options))

    @contextmanager
    def patch() -> Iterator[None]:
        pipeline.unet.forward, pipeline.vae.decode = forward, decode
        try:
            yield
        finally:  # back to their classes' own
            del pipeline.unet.forward, pipeline.vae.decode

    return replace(full, backend="diffusers, torch.compile", patch=patch)


def peers(
    pipeline: "StableDiffusionPipeline", task: Task
) -> tuple[list[Contender], dict[str, str]]:
    """What a user would install instead, and of each that is not installed the reason.

    tomesd merges tokens (arXiv 2303.17604), DeepCache caches deep features (arXiv 2312.00858).
    """
    draw = _drawer(pipeline, {**task.call, "num_inference_steps": task.steps})
    known: list[tuple[str, str, Callable[[], AbstractContextManager[None]]]] = [
        ("tomesd", "half of the tokens", lambda: _merge_tokens(pipeline, 0.5)),
        ("DeepCache", "interval 3", lambda: _cache_deeply(pipeline, 3)),
        ("DeepCache", "interval 5", lambda: _cache_deeply(pipeline, 5)),
    ]
    found, missing = [], {}
    for module, setting, patch in known:
        try:
            import_module(module)
            device = pipeline.unet.device
            found.append(Contender(f"diffusers, {module}", setting, device, draw, patch=patch))
        except ImportError as error:
            missing[module] = str(error)
    return found, missing


@contextmanager
def _merge_tokens(pipeline: "StableDiffusionPipeline", ratio: float) -> Iterator[None]:
    import tomesd

    tomesd.apply_patch(pipeline, ratio=ratio)
    try:
        yield
    finally:
        tomesd.remove_patch(pipeline)


@contextmanager
def _cache_deeply(pipeline: "StableDiffusionPipeline", interval: int) -> Iterator[None]:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()
        # It leaves its wrappers behind as attributes, which torch.compile would notice.
        for module in pipeline.unet.modules():
            module.__dict__.pop("forward", None)


def _drawer(pipeline: "StableDiffusionPipeline | EncachePipeline", call: dict[str, Any]) -> Draw:
    def draw(prompt: str, noise: Tensor) -> Tensor:
        return pipeline(prompt, latents=noise, num_images_per_prompt=len(noise), **call).images

    return draw
