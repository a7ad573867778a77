"""Pictures by cached pipelines beside the full ones, of the same noise.

    python benchmarks/system_pictures.py    # writes system_pictures.json and docs/pipelines.png

`python benchmarks/system_models.py` trains the ControlNet, the LoRA and the DiT first. A system
whose weights are not there is left out.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DiTPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image, ImageDraw, ImageFont
from samples import NAMES
from system_models import CLASSES, CONTROLNET, DIT, LORA, NOTES, edges_of
from torch import Tensor

import encache
from encache.evaluate.distribution import bootstrap_interval
from encache.evaluate.fidelity import psnr
from encache.evaluate.machine import describe_machine
from encache.files import write_json
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline
from encache.model.spec import NO_CUT
from encache.train.default_model import GUIDANCE_SCALE

RESULT = Path(__file__).with_name("system_pictures.json")
PICTURE = Path(__file__).parent.parent / "docs" / "pipelines.png"
NUM_PICTURES, STEPS, STRIDE, SCALE = 16, 50, 5, 2
#: Which pictures of a system are shown.
SHOWN = {
    "text": [10, 11],
    "image": [0, 15],
    "inpainting": [7, 12],
    "controlnet": [3, 4],
    "controlnet, image": [5, 6],
    "lora": [2, 14],
    "dit": [9, 14],
}


@dataclass(frozen=True)
class System:
    """A pipeline, and what it is given beside texts or classes.

    Attributes:
        title: over its pictures.
        pipe: the diffusers pipeline.
        arguments: of its call, for all pictures at once.
        given: what is shown of these arguments, [N, 3, 64, 64] in [0, 1].
        cut: where its features are cached, as the second way to cache.
        edges: what a ControlNet is told, alike, or None.
        seed: of the first picture; the others have the following ones.
    """

    title: str
    pipe: Any
    arguments: Mapping[str, Any]
    given: Tensor
    cut: str = "mid"
    edges: Tensor | None = None
    seed: int = 0

    def draw(self) -> Tensor:
        """Its pictures [N, 3, 64, 64] in [0, 1], always of the same noise."""
        seeds = range(self.seed, self.seed + NUM_PICTURES)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = self.pipe(
            **self.arguments, num_inference_steps=STEPS, generator=generators, output_type="np"
        )
        return torch.from_numpy(drawn.images).permute(0, 3, 1, 2)


def make_systems() -> dict[str, System]:
    """Every system with weights; one that is given a picture redraws a flat one in 3d."""
    pipe = load_pipeline(find_checkpoint())
    texts = {"prompt": [f"flat {name}" for name in NAMES], "guidance_scale": GUIDANCE_SCALE}
    flat = System("", pipe, texts, torch.empty(0), seed=100).draw()
    texts = {**texts, "prompt": [f"3d {name}" for name in NAMES]}
    right = torch.zeros(1, 1, *flat.shape[-2:])
    right[..., flat.shape[-1] // 2 :] = 1
    masked = {**texts, "image": flat, "mask_image": right.expand(len(flat), -1, -1, -1)}
    image = {**texts, "image": flat, "strength": 0.7}
    size = dict(zip(("height", "width"), flat.shape[-2:], strict=True))
    systems = {
        "text": System("text", pipe, texts, torch.ones_like(flat)),
        "image": System(
            "image to image", as_kind(StableDiffusionImg2ImgPipeline, pipe), image, flat
        ),
        "inpainting": System(
            "inpainting",
            as_kind(StableDiffusionInpaintPipeline, pipe),
            {**masked, **size, "strength": 1.0},
            flat * (1 - right / 2),
        ),
    }
    if CONTROLNET.is_dir():
        net, edges = ControlNetModel.from_pretrained(CONTROLNET), edges_of(2 * flat - 1)
        systems["controlnet"] = System(
            "ControlNet",
            as_kind(StableDiffusionControlNetPipeline, pipe, controlnet=net),
            {**texts, "image": edges},
            edges,
            edges=edges,
        )
        systems["controlnet, image"] = System(
            "ControlNet and image",
            as_kind(StableDiffusionControlNetImg2ImgPipeline, pipe, controlnet=net),
            {**image, "control_image": edges, "strength": 0.9},
            flat * (1 - edges),
            edges=edges,
        )
    if LORA.is_file():
        lined = quiet(load_pipeline(find_checkpoint(loras=[str(LORA)])))
        systems["lora"] = System("LoRA", lined, texts, torch.ones_like(flat))
    if DIT.is_dir():
        dit = quiet(DiTPipeline.from_pretrained(DIT))
        last = [*range(len(CLASSES))][-NUM_PICTURES:]
        labels = {"class_labels": last, "guidance_scale": GUIDANCE_SCALE}
        systems["dit"] = System("DiT", dit, labels, torch.ones_like(flat), cut="2")
    return systems


def as_kind(kind: Any, pipe: Any, **parts: Any) -> Any:
    """A pipeline of another class with the parts of one, and some more."""
    known = {name: one for name, one in pipe.components.items() if name != "image_encoder"}
    return quiet(kind(**known, **parts, requires_safety_checker=False))


def quiet(pipe: Any) -> Any:
    """The pipeline without its progress bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(system: System, plain: Tensor) -> tuple[dict[str, Any], Tensor]:
    """How near its cached pictures are to the full ones; and both [2, N, 3, 64, 64].

    Args:
        system: it.
        plain: pictures of the same texts without any ControlNet [N, 3, 64, 64].
    """
    calls: list[int] = []
    denoiser = getattr(system.pipe, "unet", None) or system.pipe.transformer
    hook = denoiser.register_forward_hook(lambda *_: calls.append(1))
    full = system.draw()
    hook.remove()
    drawn, found = {}, {}
    for cut in (NO_CUT, system.cut):
        encache.enable(system.pipe, STRIDE, cut=cut)
        drawn[cut] = system.draw()
        encache.disable(system.pipe)
        values = psnr(drawn[cut].numpy(), full.numpy())
        low, high = bootstrap_interval(values)
        found[cut] = {
            "psnr": {"mean": float(values.mean()), "low": float(low), "high": float(high)}
        }
    row: dict[str, Any] = {"title": system.title, "calls": len(calls), "cached": found}
    if system.edges is not None:
        row["edges"] = {
            name: alike(edges_of(2 * pictures - 1), system.edges)
            for name, pictures in {"full": full, **drawn, "without": plain}.items()
        }
    return row, torch.stack([full, drawn[NO_CUT]])


def alike(edges: Tensor, told: Tensor) -> float:
    """Mean correlation between pictures [N, 3, H, W], one by one."""
    pairs = (torch.stack(pair).flatten(1) for pair in zip(edges, told, strict=True))
    return float(torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean())


def draw() -> None:
    """Measure every system, and show two pictures of each."""
    rows: dict[str, Any] = {}
    columns = []
    plain = torch.empty(0)
    for name, system in make_systems().items():
        rows[name], pictures = measure(system, plain)
        if name == "text":
            plain = pictures[0]
        columns.append((system.title, torch.stack([system.given, *pictures])[:, SHOWN[name]]))
        print(name, json.dumps(rows[name]), flush=True)
    write_json(
        RESULT,
        {
            "machine": describe_machine(),
            "protocol": {
                "pictures": NUM_PICTURES,
                "steps": STEPS,
                "stride": STRIDE,
                "guidance_scale": GUIDANCE_SCALE,
            },
            "training": json.loads(NOTES.read_text()) if NOTES.exists() else {},
            "systems": rows,
        },
    )
    sheet(columns).quantize(256).save(PICTURE, optimize=True)


def sheet(columns: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Systems side by side: pictures [rows, 2, 3, H, W] in [0, 1] under each title, doubled."""
    size, gap, head = columns[0][1].shape[-1] * SCALE, 8, 20
    num_rows, num_shown = columns[0][1].shape[:2]
    width = len(columns) * (num_shown * size + gap) - gap
    canvas = Image.new("RGB", (width, head + num_rows * size), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (title, pictures) in enumerate(columns):
        left = column * (num_shown * size + gap)
        pen.text((left, 2), title, "black", ImageFont.load_default(14))
        for row, shown in enumerate(pictures):
            for place, picture in enumerate(shown):
                pixels = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
                tile = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
                canvas.paste(tile, (left + place * size, head + row * size))
    return canvas


def main() -> None:
    """Draw and measure."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    draw()


if __name__ == "__main__":
    main()
