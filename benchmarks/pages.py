"""Write the tables of README.md and of the pages of docs/ from benchmarks/*.json.

    python benchmarks/pages.py

A table stands between markers of its name; the rest of a page is left as it is. The plots of
docs/study.md are drawn too.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import fit_page
import gpu_page
import pipelines_page
import precision_page
import study_page
from study_page import fill, interval, markdown, number

from encache.evaluate.headline import significant

HERE = Path(__file__).parent
ROOT = HERE.parent
#: What wrote each benchmark.
COMMANDS = {
    "cpu.json": "encache-bench --ckpt model/emoji/shared.safetensors --guidance-scale 3 "
    "--plan model/emoji/plans.json --repeats 16 --json benchmarks/cpu.json",
    "cpu_sd15_shape.json": "encache-bench --sd15-shape --height 128 --width 128 --steps 10 "
    "--stride 5 --cut mid --cut none --backend onnxruntime --repeats 2 "
    "--json benchmarks/cpu_sd15_shape.json",
}
#: Rows of the README's table: what the benchmark calls them, and what a reader does.
WAYS = {
    "50 steps": "full sampler, 50 calls",
    "cut up2, stride 5": "cut up2, stride 5",
    "cut none, fitted plan of 11 runs": "fitted plan of 11 runs (the default)",
    "cut none, stride 3": "output cache, stride 3",
    "cut none, stride 5": "output cache, stride 5",
    "cut none, fitted plan of 5 runs": "fitted plan of 5 runs",
    "cut none, stride 10": "output cache, stride 10",
    "trained for 1 of 4 calls": "one encoder run (`--fast`)",
}
PEERS = ("tomesd", "DeepCache")
#: Rows of docs/performance.md's table, as the benchmark calls them.
COUNTED = (
    *(f"cut {cut}, stride {n}" for cut in ("mid", "up2") for n in (5, 10)),
    *(f"cut none, stride {n}" for n in (3, 5, 10)),
    "trained for 1 of 4 calls",
)
#: Rows of the README's table of one encoder run, likewise.
SAMPLERS = {
    "shipped, 50 steps": "full sampler",
    "shipped, 5 steps": "plain sampler, 5 steps",
    "two runs, 8 steps, mid, reuse, stride 4, guidance 1": "two encoder runs (not shipped)",
    "shipped, 3 steps": "plain sampler, 3 steps",
    "shipped for one run, 4 steps, mid, reuse, stride 4, guidance 1": "one encoder run (`--fast`)",
}
#: Manifests of compiled engines, or what was noted of them, by shape and cut.
MANIFESTS = {
    ("v1.5", "mid"): "sd15_rtx4090_mid.json",
    ("v1.5", "none"): "sd15_rtx4090_out.json",
    ("XL", "none"): "sdxl_rtx4090_none.json",
}
#: Graphs that share a column of the table.
GRAPHS = (
    ("unet_encoder", "unet"),
    ("unet_decoder",),
    ("text_encoder", "text_encoder_2"),
    ("vae_decoder",),
)

#: Of encache-bench: one contender, and the contenders of one backend by their sampling.
Row = Mapping[str, Any]
Rows = Mapping[str, Row]


def read(name: str) -> Any:
    """A committed result."""
    return json.loads((HERE / name).read_text())


def rows_of(report: Mapping[str, Any], backend: str) -> Rows:
    """A backend's contenders by their sampling."""
    return {row["sampling"]: row for row in report["rows"] if row["backend"] == backend}


def equal_cost(rows: Rows, row: Row) -> Row:
    """The plain sampler that costs at most as much; the cheapest, if none does."""
    plain = sorted(
        (one for name, one in rows.items() if name.endswith(" steps")), key=lambda one: one["gflop"]
    )
    within = [one for one in plain if one["gflop"] <= row["gflop"] * (1 + 1e-9)]
    return (within or plain[:1])[-1]


def cpu_table(report: Mapping[str, Any]) -> str:
    """Speeds against diffusers, quality, and the equal-cost sampler on ONNX Runtime."""
    torch, ort = rows_of(report, "torch"), rows_of(report, "onnxruntime")
    (plain,) = rows_of(report, "diffusers").values()

    def quality(row: Row) -> str:
        return "" if row["psnr"] is None else f"{row['psnr']:.1f}"

    def speed(row: Row) -> str:
        return f"{row['speed']:.1f}x"

    def gflop(row: Row) -> str:
        return f"{row['gflop']:.1f}"

    cells = [("diffusers", gflop(plain), f"1x ({plain['seconds']:.2f} s)", "", "", "", "", "")]
    for sampling, way in WAYS.items():
        row = ort[sampling]
        shared = [way, gflop(row), speed(torch[sampling]), speed(row)]
        if sampling.endswith(" steps"):  # what PSNR is measured against
            cells.append((*shared, "", "", "", ""))
            continue
        opponent = equal_cost(ort, row)
        steps = opponent["sampling"]
        if opponent["gflop"] > row["gflop"]:  # cheaper ones were not measured
            steps = f"dearer: {steps}, {gflop(opponent)} GFLOP"
        against = [steps, speed(opponent), quality(opponent)]
        cells.append((*shared, quality(row), *against))
    for peer in PEERS:
        for sampling, row in rows_of(report, f"diffusers, {peer}").items():
            cells.append((f"{peer}, {sampling}", "", speed(row), "", quality(row), "", "", ""))
    heads = ["way to sample", "GFLOP", "PyTorch", "ONNX Runtime", "PSNR, dB"]
    return markdown(
        [*heads, "equal-cost sampler", "its speed, ONNX Runtime", "its PSNR, dB"], cells
    )


def count_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """What the arithmetic predicts, and what was measured, against the full sampler."""
    cells = []
    for model, report in reports.items():
        rows = rows_of(report, "onnxruntime")
        full = rows[f"{report['task']['steps']} steps"]

        def ratio(of: Callable[[Row], float], row: Row, full: Row = full) -> str:
            return f"{significant(round(of(full) / of(row), 6), 3)}x"

        for sampling in COUNTED:
            if sampling not in rows:
                continue
            row = rows[sampling]
            outside = row["parts"]["outside"] / sum(row["parts"].values())
            ratios = (
                ratio(of, row) for of in (itemgetter("gflop"), unet_seconds, itemgetter("seconds"))
            )
            cells.append((model, WAYS.get(sampling, sampling), *ratios, f"{outside:.1%}"))
    heads = ["model", "setting", "by the count", "in the UNet", "whole picture"]
    return markdown([*heads, "outside the engines"], cells)


def unet_seconds(row: Row) -> float:
    """Spent in the UNet, whole or in halves, in one run."""
    return sum(row["parts"].get(name, 0) for name in ("denoise", "encode", "decode"))


def protocol_table(names: Sequence[str]) -> str:
    """Which command wrote a result, where, when, on how many pictures."""
    cells = []
    for name in names:
        report = read(name)
        machine, task = report["machine"], report["task"]
        cells.append(
            (
                f"`benchmarks/{name}`",
                f"`{COMMANDS[name]}`",
                f"{machine['cores']} cores of an {machine['cpu']}, no GPU",
                report["dtype"],
                str(task["steps"]),
                str(report["repeats"]),
                machine["date"],
            )
        )
    return markdown(["result", "command", "machine", "dtype", "calls", "N", "date"], cells)


def shared_table(rows: Sequence[Row]) -> str:
    """What one encoder run draws beside plain samplers."""
    found = {row["name"]: row for row in rows}
    cells = [
        (
            name,
            f"{100 * found[key]['share']:.1f}",
            interval(found[key]["latent_error"]),
            number(found[key]["frechet"]),
        )
        for key, name in SAMPLERS.items()
    ]
    return markdown(["sampler", "rows of the UNet", "latent error", "Frechet distance"], cells)


def engines_table(manifests: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """What compiling took, and the scratch memory of each engine."""

    def scratch(manifest: Mapping[str, Any], graphs: Sequence[str]) -> str:
        sizes = [manifest["scratch_bytes"].get(graph) for graph in graphs]
        return ", ".join(f"{size / 2**20:.0f}" for size in sizes if size is not None) or "none"

    cells = [
        (*which, f"{one['build_seconds']:.0f}", *(scratch(one, graphs) for graphs in GRAPHS))
        for which, one in manifests.items()
    ]
    parts = ["whole or encoder", "decoder (10 calls)", "text encoders", "image decoder"]
    return markdown(["shape", "cut", "seconds", *parts], cells)


def fill_gpu(page: str) -> str:
    """A page with the table of what was timed on a GPU."""
    report = read("sd15_h100.json")
    return fill(page, "gpu", f"{gpu_page.gpu_table(report)}\n\n{gpu_page.protocol(report)}")


def fill_readme(page: str) -> str:
    """README.md with its tables."""
    page = fill(page, "cpu", cpu_table(read("cpu.json")))
    page = fill(page, "cpu protocol", protocol_table(["cpu.json"]))
    page = fill_gpu(page)
    return fill(page, "one encoder run", shared_table(read("shared.json")["rows"]))


def fill_performance(page: str) -> str:
    """docs/performance.md with its tables."""
    reports = {"default": read("cpu.json"), "v1.5 shape": read("cpu_sd15_shape.json")}
    page = fill(page, "cpu by the count", count_table(reports))
    page = fill(page, "cpu protocol", protocol_table(list(COMMANDS)))
    page = fill_gpu(page)
    page = fill(page, "gpu parts", gpu_page.parts_table(read("sd15_h100.json")))
    manifests = {which: read(name) for which, name in MANIFESTS.items()}
    page = fill(page, "engines", engines_table(manifests))
    page = fill(page, "calls on a CPU", precision_page.calls_table(read("precision_cpu.json")))
    openvino = {
        "default": read("cpu_openvino.json"),
        "v1.5 shape": read("cpu_sd15_shape_openvino.json"),
    }
    page = fill(page, "openvino", precision_page.openvino_table(openvino))
    rows = read("precision_engines.json")["rows"]
    page = fill(page, "engines in 8 bits", precision_page.eight_bits_table(rows))
    return fill(
        page,
        "pictures in 8 bits",
        precision_page.precision_table(read("precision_quality.json")["rows"]),
    )


def where(report: Mapping[str, Any]) -> list[str]:
    """The last cells of a row: the command, the machine, the date."""
    machine = report["machine"]
    cores = f"{machine['cores']} cores of an {machine['cpu']}"
    return [f"`{report['command']}`", cores, machine["date"]]


def faults_table(fuzz: Mapping[str, Any], cluster: Mapping[str, Any]) -> str:
    """What was done to the server and to a cluster, and what came of it."""
    answers = ", ".join(
        f"{number} x {status}" for status, number in sorted(fuzz["answers"].items())
    )
    fuzzed = "all as documented" if fuzz["as_documented"] else "not all as documented"
    alive = "alive" if fuzz["alive_afterwards"] else "dead"
    lost = cluster["pictures"] - cluster["pictures_found"]
    same = "the same" if cluster["same_bytes_as_one_process"] else "other"
    cells = [
        (
            f"{fuzz['requests']} fuzzed requests",
            f"{answers}; {fuzzed}; server {alive} afterwards",
            *where(fuzz),
        ),
        (
            f"a node lost after {cluster['drawn_before_the_node_was_removed']} of "
            f"{cluster['pictures']} pictures",
            f"{lost} lost, {same} bytes",
            *where(cluster),
        ),
    ]
    return markdown(["what", "result", "command", "machine", "date"], cells)


def load_table(load: Mapping[str, Any]) -> str:
    """Requests per second and latencies, alone and by the number of clients."""

    def cells_of(name: str, one: Mapping[str, Any], *rest: str) -> tuple[str, ...]:
        latencies = (f"{one[f'p{part}_ms']:.0f}" for part in (50, 95, 99))
        return (name, f"{one['per_second']:.1f}", *latencies, *rest)

    cells = [
        cells_of(f"alone, {time} the clients", one, "1x", "", "", "")
        for time, one in zip(("before", "after"), load["alone"], strict=True)
    ]
    for one in load["served"]:
        failed = sum(number for status, number in one["statuses"].items() if status != "200")
        rest = [f"{one['speedup']:.2f}x", f"{one['batches']['mean']:.1f}", str(failed)]
        memory = " to ".join(f"{size:.0f}" for size in one["rss_mib"])
        who = f"{one['clients']} client{'s' * (one['clients'] > 1)}"
        cells.append(cells_of(who, one, *rest, memory))
    heads = ["who asks", "requests per second", "p50, ms", "p95, ms", "p99, ms", "speed"]
    table = markdown([*heads, "pictures in a batch", "errors", "memory, MiB"], cells)
    command, machine, date = where(load)
    return f"{table}\n\n({command}: {load['seconds']:g} s of each, on {machine}, {date}.)"


def pace_table(pace: Mapping[str, Any]) -> str:
    """Pictures per second of both commands."""
    speed, overhead = pace["pictures_per_second"], pace["overhead_percent"]
    chunks = overhead["chunks"]
    flushed, not_flushed = (pace["writing_ms_per_picture"][n] for n in ("flushed", "not_flushed"))
    cells = [
        ("`encache-run`, pictures per second", f"{speed['run']:.1f}"),
        ("`encache-batch`, pictures per second", f"{speed['batch']:.1f}"),
        (
            "time of `encache-batch` over `encache-run`'s: median of the chunks, and the extremes",
            f"{overhead['median']:+.1f} % ({min(chunks):+.1f} to {max(chunks):+.1f})",
        ),
        ("to write a picture, ms", f"{flushed:.2f}"),
        ("the same without waiting for the disk, ms", f"{not_flushed:.2f}"),
    ]
    command, machine, date = where(pace)
    table = markdown(["what", "measured"], cells)
    return f"{table}\n\n({command}: {pace['pictures']} pictures, on {machine}, {date}.)"


def fill_serving(page: str) -> str:
    """docs/serving.md with the tables that there are results for."""
    served, bulk = read("serve.json"), read("bulk.json")
    page = fill(page, "faults", faults_table(served["fuzz"], bulk["cluster"]))
    if "load" in served:
        page = fill(page, "load", load_table(served["load"]))
    return fill(page, "pace", pace_table(bulk["pace"])) if "pace" in bulk else page


def fill_pipelines(page: str) -> str:
    """docs/pipelines.md with its tables."""
    return pipelines_page.fill_page(page, read("systems.json"), read("system_pictures.json"))


def fill_study(page: str) -> str:
    """docs/study.md with its tables."""
    page = study_page.fill_page(page, read("study.json"), read("shared.json")["rows"])
    page = fill(page, "fitted blends", fit_page.features_table(read("fit_features.json")["rows"]))
    return fit_page.fill_page(page, read("fit.json"))


#: Every page that has tables of measurements, and what fills them.
PAGES: dict[str, Callable[[str], str]] = {
    "README.md": fill_readme,
    "docs/performance.md": fill_performance,
    "docs/pipelines.md": fill_pipelines,
    "docs/serving.md": fill_serving,
    "docs/study.md": fill_study,
}


def main() -> None:
    """Fill every page, then draw the plots."""
    for name, fill_it in PAGES.items():
        path = ROOT / name
        path.write_text(fill_it(path.read_text()))
    shared = read("shared.json")["rows"]
    study_page.draw(read("study.json")["answers"], shared, ROOT / "docs" / "study")
    eight_bits = read("precision_quality.json")["rows"]
    precision_page.draw(eight_bits, ROOT / "docs" / "performance" / "precision.svg")


if __name__ == "__main__":
    main()
