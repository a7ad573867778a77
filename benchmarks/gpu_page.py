"""The tables of what was timed on a GPU; `python benchmarks/pages.py` writes them."""

from collections.abc import Mapping
from typing import Any

from study_page import Row, markdown

from encache.contract.library import TORCH_BACKENDS
from encache.evaluate.headline import significant

#: What wrote the result.
COMMAND = (
    "encache-bench --sd15-shape --backend torch --backend torch.compile --compile --cut none "
    "--stride 3 --stride 5 --stride 10 --repeats 5 --json benchmarks/sd15_h100.json"
)
#: Contenders, and what a reader does.
WAYS = {
    "50 steps": "full sampler, 50 calls",
    "cut none, stride 3": "output cache, stride 3",
    "17 steps": "plain sampler, 17 steps",
    "cut none, stride 5": "output cache, stride 5",
    "10 steps": "plain sampler, 10 steps",
    "cut none, stride 10": "output cache, stride 10",
    "5 steps": "plain sampler, 5 steps",
}


def gpu_table(report: Mapping[str, Any]) -> str:
    """Milliseconds and speeds of a picture: diffusers and its additions, then this project."""
    rows = {(row["backend"], row["sampling"]): row for row in report["rows"]}
    cells = [
        (backend if sampling == "50 steps" else f"{backend}, {sampling}", *_time(row), "", "")
        for (backend, sampling), row in rows.items()
        if backend not in TORCH_BACKENDS
    ]
    for sampling, way in WAYS.items():
        eager, compiled = (_time(rows[backend, sampling]) for backend in TORCH_BACKENDS)
        cells.append((f"encache, {way}", *eager, *compiled))
    heads = ["way to sample", "ms a picture", "speed", "ms, torch.compile", "speed"]
    return markdown(heads, cells)


def parts_table(report: Mapping[str, Any]) -> str:
    """Where a picture's time goes, and how near the UNet's arithmetic comes to the GPU's."""
    cells = []
    for row in report["rows"]:
        if row["backend"] in TORCH_BACKENDS and row["sampling"] in (
            "50 steps",
            "cut none, stride 10",
        ):
            texts, codec = (row["parts"][name] for name in ("texts", "codec"))
            tflops = row["gflop"] / (row["seconds"] - texts - codec) / 1e3
            cells.append(
                (
                    row["backend"],
                    WAYS[row["sampling"]],
                    *(f"{1e3 * seconds:.0f}" for seconds in (row["seconds"], texts, codec)),
                    f"{tflops:.0f}",
                    f"{tflops / report['matrix_product_tflops']:.0%}",
                )
            )
    heads = ["backend", "setting", "ms a picture", "texts, ms", "image decoder, ms"]
    return markdown([*heads, "UNet, TFLOP/s", "over a large matrix product's"], cells)


def protocol(report: Mapping[str, Any]) -> str:
    """One line: the command, the machine, N and the date."""
    machine = report["machine"]
    return (
        f"(`{COMMAND}`: one {machine['gpu']}, PyTorch {machine['torch']}, {report['dtype']}, "
        f"512x512, batch 1, N = {report['repeats']}, all taking turns, {machine['date']}; one "
        f"large matrix product reached {report['matrix_product_tflops']:.0f} TFLOP/s. Here "
        "torch.compile had the UNet alone, in its default mode; the command has since come to "
        "compile the image decoder too, and diffusers' UNet with CUDA graphs.)"
    )


def _time(row: Row) -> tuple[str, str]:
    return f"{1e3 * row['seconds']:.0f}", f"{significant(row['speed'], 3)}x"
