"""The tables of lower precision in docs/performance.md; `benchmarks/pages.py` writes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study_page import markdown, number, plot

Row = Mapping[str, Any]


def eight_bits_table(rows: Sequence[Row]) -> str:
    """What compiling in each precision took, and what came of it."""
    names = {"unet": "whole UNet", "unet_encoder": "encoder", "unet_decoder": "decoder"}
    cells = [
        (
            names[row["graph"]] + (f", cut {row['cut']}" if row["cut"] != "none" else "")
            if row["graph"] in names
            else "image decoder",
            row["dtype"],
            f"{row['milliseconds']:.2f}",
            f"{row['share']:.1%}" if "share" in row else "",
            str(len(row["fallen_back"])) if "share" in row else "",
            f"{row['engine_bytes'] / 1e6:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['peak_bytes'] / 1e9:.1f}",
        )
        for row in rows
    ]
    heads = ["part", "dtype", "counted ms", "in 8 bits", "fell back", "engine, MB"]
    return markdown([*heads, "seconds", "memory, GB"], cells)


def precision_table(rows: Sequence[Row]) -> str:
    """What a precision and a cache cost in the default model's pictures, by counted time."""
    cells = [
        (
            row["precision"],
            row["sampling"].replace("none, extrapolate", "output cache"),
            f"{1e3 * row['milliseconds']:.0f}",
            "" if row["psnr"] is None else f"{row['psnr']['mean']:.1f}",
            "" if row["latent_error"] is None else number(row["latent_error"]["mean"]),
            ""
            if row["against the same in fp32"]["psnr"] is None
            else f"{row['against the same in fp32']['psnr']['mean']:.1f}",
            number(row["frechet"]),
        )
        for row in rows
    ]
    heads = ["dtype", "sampler", "counted microseconds", "PSNR, dB", "latent error"]
    return markdown([*heads, "PSNR against the same in fp32, dB", "Frechet distance"], cells)


def calls_table(report: Mapping[str, Any]) -> str:
    """One guided call of the default model's UNet on a CPU."""
    cells = [
        (
            row["contender"],
            f"{row['milliseconds']:.1f}",
            f"{row['speed']:.2f}x",
            f"{row['error']:.2%}" if row["error"] > 1e-4 else "none",
        )
        for row in report["rows"]
    ]
    return markdown(["contender", "ms a call", "speed", "error of the noise"], cells)


def openvino_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Whole pictures in both libraries, OpenVINO in bf16."""
    cells = []
    for model, report in reports.items():
        rows = {(row["backend"], row["sampling"]): row for row in report["rows"]}
        for backend, sampling in rows:
            if backend != "openvino":
                continue
            theirs, ours = rows["onnxruntime", sampling], rows[backend, sampling]
            cells.append(
                (
                    model,
                    sampling.replace("cut none", "output cache"),
                    *(f"{1e3 * row['seconds']:.0f}" for row in (theirs, ours)),
                    f"{theirs['seconds'] / ours['seconds']:.2f}x",
                    *(f"{row['psnr']:.1f}" for row in (theirs, ours)),
                )
            )
    heads = ["model", "sampler", "ONNX Runtime, ms", "OpenVINO, ms", "speed"]
    return markdown([*heads, "PSNR, ONNX Runtime", "PSNR, OpenVINO"], cells)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Latent error of the output cache by counted time, a line for each precision."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows:
        error = row["latent_error"]
        if error and "up2" not in row["sampling"]:
            point = (1e3 * row["milliseconds"], error["mean"], error["low"], error["high"])
            lines.setdefault(row["precision"], []).append(point)
    path.parent.mkdir(exist_ok=True)
    plot(lines, "counted microseconds on an RTX 4090", path, ticks=(15, 30, 60, 120, 240))
