"""What do 8 bits cost in the default model's pictures, alone and together with a cache?

    python benchmarks/study.py pictures                         # real pictures
    python benchmarks/precision_quality.py                      # 64 pictures per row
    python benchmarks/precision_quality.py --num-images 512     # as many as docs/study.md has

Writes benchmarks/precision_quality.json. No GPU is needed: PyTorch computes in fp32, and rounds
what goes into each layer, its weights and what comes out as the engines do. Scales and kept layers
are those of `encache-export`. The image decoder is rounded too. A repeated command goes on where it
stopped.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peaks import PEAK_TFLOPS, milliseconds
from torch import Tensor, nn
from tqdm import tqdm

from encache.contract.calibration import make_calibration
from encache.evaluate.extractors import load_extractor
from encache.evaluate.machine import describe_machine
from encache.evaluate.real import Real, read_real
from encache.evaluate.rows import make_row
from encache.evaluate.sampling import Backend, Evaluation, Model
from encache.evaluate.settings import Protocol, Setting, read_prompts
from encache.evaluate.store import Store
from encache.export.calibrate import LIMITS, Layer, Observed, Trajectories, round_to
from encache.export.graphs import pipeline_graphs
from encache.export.quantize import choose_kept, expected_error, scale_of
from encache.files import write_json
from encache.model.checkpoint import Checkpoint, default_model, find_checkpoint
from encache.model.loading import load_pipeline
from encache.model.spec import NO_CUT, Cut
from encache.runtime.pipeline import EncachePipeline

FOLDER = Path("runs/precision_quality")
REAL = Path("runs/study/real")
EXACT, HALF = "fp32", "fp16"
#: Precision, and the share of the arithmetic that may stay in fp16.
PRECISIONS = {"int8": ("int8", 0.15), "fp8": ("fp8", 0.15)}
#: At one stride, what keeping more or less of it gains.
FRONT = {f"int8, {share:.0%} kept": ("int8", share) for share in (0.3, 0.5)}
FRONT_STRIDE = 3
#: Of a row, the first two against the same setting in fp32, too.
MEASURED = ("psnr", "latent_error", "frechet")
Row = dict[str, Any]


class Calibrated:
    """What the model was seen doing, measured when it is first asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._known: dict[tuple[Cut, str], Mapping[str, Observed]] = {}

    @cached_property
    def _drawn(self) -> tuple[Any, Trajectories]:
        pipeline = load_pipeline(self._checkpoint, torch.float32)
        calibration = make_calibration(self._checkpoint)
        return pipeline, Trajectories(pipeline, calibration, self._checkpoint.guidance_scale)

    def observe(self, cut: Cut, dtype: str) -> Mapping[str, Observed]:
        """By name, the graphs at a cut; without the runs that they were compared on."""
        if (cut, dtype) not in self._known:
            pipeline, trajectories = self._drawn
            observed = trajectories.observe(pipeline_graphs(pipeline, cut), dtype)
            bare = {name: replace(one, samples=()) for name, one in observed.items()}
            self._known[cut, dtype] = bare
        return self._known[cut, dtype]


class Rounded(Model):
    """The model in a precision that is only simulated.

    Args:
        checkpoint: the model.
        name: of the precision, under which results are stored.
        dtype: "fp16", "int8" or "fp8".
        share: of the arithmetic, at most, that stays in fp16.
        calibrated: where scales come from.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, dtype: str, share: float, calibrated: Calibrated
    ) -> None:
        super().__init__(checkpoint, Backend("torch", dtype=f"{name}, simulated"))
        self.dtype, self._share, self._calibrated = dtype, share, calibrated

    @cached_property
    def diffusers(self) -> Any:
        """Not rounded: for shapes and the scheduler."""
        return load_pipeline(self.checkpoint, torch.float32)

    def quantized(self, cut: Cut) -> dict[str, tuple[Observed, frozenset[str]]]:
        """By graph, what it does and the layers that are kept; nothing in fp16."""
        if self.dtype == HALF:
            return {}
        observed = self._calibrated.observe(cut, self.dtype)
        return {name: (one, choose_kept(one, self._share, True)) for name, one in observed.items()}

    def _open(self, cut: Cut) -> EncachePipeline:
        pipeline = load_pipeline(self.checkpoint, torch.float32)
        for module in (pipeline.unet, pipeline.vae):
            for layer in layers_of(module):
                round_to_half(layer)
        opened = EncachePipeline.from_pipe(pipeline, cut)  # which knows no such attention as here
        graphs = {one.spec.name: one for one in pipeline_graphs(pipeline, cut)}
        done: set[nn.Module] = set()  # of halves, both have the time embedding
        for name, (observed, kept) in self.quantized(cut).items():
            for path, layer in observed.layers.items():
                module = graphs[name].module.get_submodule(path)
                if path not in kept and module not in done:
                    round_layer(module, layer, self.dtype)
                    done.add(module)
        return opened


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """Convolutions and matrix products."""
    return (one for one in module.modules() if isinstance(one, nn.Conv2d | nn.Linear))


def half(x: Tensor) -> Tensor:
    """A tensor of any shape as fp16 holds it."""
    return x.half().float()


def round_to_half(layer: Any) -> None:
    """Round a layer's weights, its input and its output to fp16."""
    layer.weight.data = half(layer.weight.data)
    layer.register_forward_pre_hook(lambda _, given: (half(given[0]), *given[1:]))
    layer.register_forward_hook(lambda _, given, output: half(output))


def round_layer(module: Any, layer: Layer, dtype: str) -> None:
    """Round a layer's weights and its input to 8 bits; of attention query, key, value, weights."""
    if layer.is_attention:
        module.set_processor(Attention8(layer.maxima))
        return
    weight = module.weight.data
    module.weight.data = round_up_to(weight, weight.abs().max().item(), dtype)
    (maximum,) = layer.maxima
    module.register_forward_pre_hook(
        lambda _, given: (round_up_to(given[0], maximum, dtype), *given[1:])
    )


def round_up_to(x: Tensor, maximum: float, dtype: str) -> Tensor:
    """A tensor of any shape with the scale that a graph holds, which fp16 rounded up."""
    return round_to(x, float(scale_of(maximum, dtype)) * LIMITS[dtype], dtype)


class Attention8(nn.Module):
    """Attention in FP8.

    Args:
        maxima: largest magnitude of query, key and value.
    """

    def __init__(self, maxima: Sequence[float]) -> None:
        super().__init__()
        self._maxima = maxima

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Of tokens [B, L, C], as diffusers calls it."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        given = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (
            round_up_to(one, maximum, "fp8").unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for one, maximum in zip(given, self._maxima, strict=True)
        )
        weights = torch.softmax(query @ key.transpose(-1, -2) * attn.scale, -1)
        attended = round_to(weights, 1.0, "fp8") @ value
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


class Costs:
    """Milliseconds of a picture, counted at the published peaks: the UNet and the image decoder."""

    def __init__(self, evaluation: Evaluation, calibrated: Calibrated) -> None:
        self._evaluation = evaluation
        self._picture = calibrated.observe(NO_CUT, "int8")["vae_decoder"].flop / 1e9

    def milliseconds(self, setting: Setting) -> float:
        """Of one picture; in fp32, as if it were in fp16."""
        evaluation = self._evaluation
        model = evaluation.models[setting.model]
        plan, counted = model.plan(setting), model.arithmetic(setting.cut, evaluation.protocol)
        rows = evaluation.protocol.rows_of(setting)
        whole = setting.cut == NO_CUT
        gflop = {
            "unet" if whole else "unet_encoder": rows * plan.num_evaluations * counted.encoder,
            "unet_decoder": rows * plan.num_calls * counted.decoder,
            "vae_decoder": self._picture,
        }
        quantized = model.quantized(setting.cut) if isinstance(model, Rounded) else {}
        return sum(one * self._per_gflop(quantized.get(name), model) for name, one in gflop.items())

    def _per_gflop(self, graph: tuple[Observed, frozenset[str]] | None, model: Model) -> float:
        if graph is None or not isinstance(model, Rounded):
            return 1 / PEAK_TFLOPS[HALF]
        return milliseconds(*graph, model.dtype) / (graph[0].flop / 1e9)


def settings_of(model: str) -> list[Setting]:
    """The full sampler, and what the README has."""
    full = Setting(model, "", 50)
    cached = [replace(full, stride=stride) for stride in (3, 5, 10)]
    return [full, *cached, replace(full, stride=5, cut="up2")]


def make_rows(evaluation: Evaluation, costs: Costs, real: Real | None) -> Iterator[Row]:
    """Every precision and setting: its whole error, and what its precision alone adds."""
    full = Setting(EXACT, "", 50)
    settings = [one for name in (EXACT, *PRECISIONS, HALF) for one in settings_of(name)]
    settings += [Setting(name, "", 50, stride=FRONT_STRIDE) for name in FRONT]
    for setting in tqdm(settings):
        exact = replace(setting, model=EXACT)
        row = make_row(evaluation, setting, full, full, real=real)
        alone = make_row(evaluation, setting, exact, full)
        model = evaluation.models[setting.model]
        quantized = model.quantized(setting.cut) if isinstance(model, Rounded) else {}
        yield {
            "precision": setting.model,
            "sampling": replace(setting, model="").name,
            "milliseconds": costs.milliseconds(setting),
            "runs": row.encoder_runs,
            "graphs": {
                name: {
                    "share": 1 - sum(one.layers[path].flop for path in kept) / one.flop,
                    "expected_error": expected_error(one, kept),
                    "kept": sorted(kept),
                }
                for name, (one, kept) in quantized.items()
            },
            **{name: value for name, value in asdict(row).items() if name in MEASURED},
            "against the same in fp32": {
                name: value for name, value in asdict(alone).items() if name in MEASURED[:2]
            },
        }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--real", type=Path, default=REAL, help="as benchmarks/study.py fetches")
    parser.add_argument("--store", type=Path, default=FOLDER / "store")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/precision_quality.json"))
    options = parser.parse_args()
    checkpoint = find_checkpoint()
    calibrated = Calibrated(checkpoint)
    models: dict[str, Model] = {EXACT: Model(checkpoint, Backend("torch"))}
    for name, (dtype, share) in {HALF: (HALF, 1.0), **PRECISIONS, **FRONT}.items():
        models[name] = Rounded(checkpoint, name, dtype, share, calibrated)
    prompts = tuple(read_prompts(default_model() / "prompts.txt"))
    protocol = Protocol(prompts, options.num_images, checkpoint.guidance_scale)
    extractor = load_extractor("efficientnet-lite0")
    evaluation = Evaluation(models, protocol, Store(options.store), extractor)
    real = read_real(options.real, extractor, (64, 64), evaluation.store)
    facts = {
        "num_images": options.num_images,
        "guidance_scale": protocol.guidance_scale,
        "extractor": extractor.name,
        "calibration": asdict(make_calibration(checkpoint)),
        "peak_tflops": PEAK_TFLOPS,
    }
    rows: list[Row] = []
    for row in make_rows(evaluation, Costs(evaluation, calibrated), real):
        rows.append(row)
        content = {"machine": describe_machine(), "protocol": facts, "rows": rows}
        write_json(options.output, content)


if __name__ == "__main__":
    main()
