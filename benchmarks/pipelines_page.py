"""The tables of docs/pipelines.md; `python benchmarks/pages.py` writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from study_page import fill, interval, markdown

from encache.evaluate.headline import significant
from encache.model.spec import NO_CUT

#: Rows: what the benchmark calls them, and what a reader does.
NAMES = {
    "image": "Stable Diffusion, image to image",
    "inpainting, 4 channels": "inpainting, 4 channels",
    "inpainting, 9 channels": "inpainting, 9 channels",
    "xl refiner": "XL's refiner",
    "xl inpainting": "XL inpainting, 9 channels",
    "controlnet": "ControlNet",
    "controlnet, xl": "ControlNet for XL",
    "latent consistency": "LCM",
    "turbo": "Turbo",
    "if-1": "DeepFloyd-IF, stage I",
    "if-2": "DeepFloyd-IF, stage II",
    "dit": "DiT",
    "text2video-zero": "Text2Video-Zero",
    "videofusion": "VideoFusion",
}

#: Whose edges are compared with those that a ControlNet is told: without it, and with it.
EDGES = ("without", "full", NO_CUT)
#: What was trained.
TRAINED = {"controlnet": "ControlNet, edges", "lora": "LoRA, lines", "dit": "DiT, 24 emoji"}


def fill_page(page: str, systems: Mapping[str, Any], pictures: Mapping[str, Any]) -> str:
    """docs/pipelines.md with its tables."""
    page = fill(page, "systems", systems_table(systems))
    page = fill(page, "halves", halves_table(systems))
    page = fill(page, "pictures", pictures_table(pictures))
    return fill(page, "trained", trained_table(pictures["training"]))


def systems_table(report: Mapping[str, Any]) -> str:
    """What a picture of every pipeline costs, in full and cached."""

    def change(pair: Sequence[float]) -> str:
        full, cached = (significant(one, 3) for one in pair)
        if full == cached:
            return full if pair[0] else ""
        return f"{full} to {cached}"

    cells = []
    for system, name in NAMES.items():
        for one in report["systems"][system]["caches"]:
            counts = (str(one[key]) for key in ("calls", "encoder_runs", "decoder_runs"))
            parts = (one["mflop"][part] for part in ("denoiser", "controlnet", "codec"))
            what = "output" if one["cut"] == "none" else f"features, cut {one['cut']}"
            cells.append((name, what, *counts, *map(change, (*parts, one["seconds"]))))
    heads = ["pipeline", "what is cached", "calls", "encoder runs", "decoder runs"]
    return markdown([*heads, "denoiser, MFLOP", "ControlNet", "codec", "seconds"], cells)


def halves_table(report: Mapping[str, Any]) -> str:
    """How near both halves are to PyTorch in ONNX Runtime, and what TensorRT-RTX made of them."""
    cells = []
    for system, name in NAMES.items():
        if (one := report["systems"][system].get("engines")) is None:
            continue
        layers = " and ".join(map(str, one["tensorrt_layers"].values()))
        cut = report["systems"][system]["caches"][-1]["cut"]
        cells.append((name, cut, f"{one['onnxruntime_error']:.0e}", layers))
    heads = ["pipeline", "cut", "ONNX Runtime against PyTorch"]
    return markdown([*heads, "layers of both halves in TensorRT-RTX"], cells)


def pictures_table(report: Mapping[str, Any]) -> str:
    """How near cached pictures are to the full ones, and how near both are to a ControlNet's edges.

    Args:
        report: of system_pictures.py.
    """
    cells = []
    for row in report["systems"].values():
        cut = next(name for name in row["cached"] if name != NO_CUT)
        near = [interval(row["cached"][name]["psnr"]) for name in (NO_CUT, cut)]
        near[1] += f", cut {cut}"
        edges = [f"{row['edges'][name]:.2f}" for name in EDGES if "edges" in row]
        cells.append((row["title"], str(row["calls"]), *near, *(edges or ["", "", ""])))
    heads = ["pipeline", "calls", "output cache, PSNR, dB", "features, PSNR, dB"]
    heads += ["edges without ControlNet", "edges, full", "edges, output cache"]
    protocol, machine = report["protocol"], report["machine"]
    return (
        f"{markdown(heads, cells)}\n\n(`python benchmarks/system_pictures.py`: "
        f"{protocol['pictures']} pictures of each, stride {protocol['stride']}, "
        f"{protocol['steps']} DDIM calls, guidance {protocol['guidance_scale']:g}, 95 % intervals, "
        f"on one of {machine['cores']} cores of an {machine['cpu']}, {machine['date']}.)"
    )


def trained_table(training: Mapping[str, Any]) -> str:
    """What was trained for these pictures, and what it cost."""
    cells = []
    for name, one in training.items():
        machine = one["machine"]
        cells.append(
            (
                TRAINED[name],
                str(one["steps"]),
                str(one["batch_size"]),
                f"{one['cpu_seconds'] / 60:.1f}",
                f"one of {machine['cores']} cores of an {machine['cpu']}",
                machine["date"],
            )
        )
    return markdown(
        ["what", "steps", "pictures in a step", "CPU minutes", "machine", "date"], cells
    )
