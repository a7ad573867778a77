"""Train the students of docs/study.md ("Pictures right, features shared") and measure them.

    python benchmarks/study.py pictures                 # the real pictures, once
    python benchmarks/shared.py train                   # every student in turn; hours each
    python benchmarks/shared.py report                  # writes benchmarks/shared.json, a picture

Both steps go on where they were stopped. A student that is not trained yet is left out. Rows that
the results hold already are kept, so that students trained elsewhere need not be trained again;
--student measures one anew.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from encache.evaluate.distribution import bootstrap_interval
from encache.evaluate.extractors import load_extractor
from encache.evaluate.machine import describe_machine
from encache.evaluate.real import read_real
from encache.evaluate.rows import make_row, plain_at_equal_arithmetic
from encache.evaluate.sampling import Backend, Evaluation, Model
from encache.evaluate.settings import Protocol, Setting, own_setting, read_prompts
from encache.evaluate.store import Store
from encache.files import write_json
from encache.model.checkpoint import default_model, fast_model, find_checkpoint
from encache.runtime.planfile import read_plans

FOLDER = Path("runs/shared")
REAL = Path("runs/study/real")
PICTURE = Path("docs/study/one-run.png")
PLANS = default_model() / "plans.json"
NUM_IMAGES = 512
SEEDS = (0, 1, 2)
COMMON = {
    "--pairs-dir": str(FOLDER / "pairs"),
    "--num-pairs": "17344",
    "--pairs-seed": "7",
    # A fifth of the teacher's work; .0037 off (docs/study.md), far less than any student.
    "--teacher-stride": "5",
    "--teacher-backend": "onnxruntime",
    "--teacher-batch-size": "64",
    "--prediction": "v_prediction",
    "--learning-rate": "1e-3",
    "--lr-scheduler": "cosine",
    "--lr-warmup-steps": "50",
    "--train-batch-size": "32",
    "--mixed-precision": "bf16",
    "--ema-decay": "0.998",
    "--save-dtype": "fp16",
    "--report-to": "none",
}
#: Of FCR in the same loop: pairs up to a stride of ten apart, over the features' own size.
REGULARISED = {"--fcr-weight": "0.1", "--fcr-form": "relative", "--fcr-stride": "10"}
SHORT = {"--max-train-steps": "300"}
#: The teacher's own 50 calls, an encoder run at every tenth; compared at the end of each segment.
LONG = {
    "--steps": "50",
    "--stride": "10",
    "--timestep-spacing": "leading",
    "--prediction": "epsilon",
    "--num-pairs": "4096",
    "--train-batch-size": "8",
    "--learning-rate": "3e-4",
    "--max-train-steps": "450",
}
ONE_RUN = str(FOLDER / "one-run" / "shared.safetensors")
STUDENTS: dict[str, dict[str, str]] = {
    "one run": {"--max-train-steps": "3600"},
    # The weights that ship: from those, on new pictures and a GPU, minutes.
    "one run, more pictures": {
        "--student-weights": ONE_RUN,
        "--pairs-dir": str(FOLDER / "more-pairs"),
        "--pairs-seed": "11",
        "--num-pairs": "65472",
        "--teacher-backend": "torch",
        "--teacher-batch-size": "2048",
        "--max-train-steps": "650",
        "--train-batch-size": "512",
        "--learning-rate": "1.5e-3",
        "--ema-decay": "0.99",
    },
    # From the weights of one run, on new pictures besides.
    "two runs": {
        "--max-train-steps": "2000",
        "--steps": "8",
        "--stride": "4",
        "--student-weights": ONE_RUN,
        "--learning-rate": "5e-4",
        "--num-pairs": "32000",
    },
    "long, mid": {**LONG, "--cut": "mid"},
    "long, up2": {**LONG, "--cut": "up2"},
    **{f"short {seed}": {**SHORT, "--seed": str(seed)} for seed in SEEDS},
    **{f"short, FCR {seed}": {**SHORT, **REGULARISED, "--seed": str(seed)} for seed in SEEDS},
}
SHIPPED, FAST = "shipped", "shipped for one run"


def folder_of(student: str) -> Path:
    """Where `train` leaves it."""
    return FOLDER / student.replace(" ", "-").replace(",", "")


def train(wanted: list[str]) -> None:
    """Run `encache-train shared` for every student."""
    for name in wanted or STUDENTS:
        options = {**COMMON, **STUDENTS[name], "--output-dir": str(folder_of(name))}
        words = [word for option in options.items() for word in option]
        command = [sys.executable, "-m", "encache.train.cli", "shared", *words]
        subprocess.run(command, check=True)


def open_evaluation(store: Path) -> Evaluation:
    """The model that ships, its companion, and the students that are there."""
    gpu = torch.cuda.is_available()
    engines = FOLDER / "engines"
    backend = Backend("torch", device="cuda") if gpu else Backend("onnxruntime", engine_dir=engines)
    weights = {name: folder_of(name) / "shared.safetensors" for name in STUDENTS}
    weights[FAST] = fast_model()
    models = {SHIPPED: Model(find_checkpoint(), backend)}
    models |= {
        name: Model(find_checkpoint(path), backend)
        for name, path in weights.items()
        if path.is_file()
    }
    prompts = tuple(read_prompts(default_model() / "prompts.txt"))
    scale = find_checkpoint().guidance_scale
    protocol = Protocol(prompts, NUM_IMAGES, scale, batch_size=256 if gpu else 16)
    extractor = load_extractor("efficientnet-lite0", device="cuda" if gpu else "cpu")
    return Evaluation(models, protocol, Store(store), extractor)


def report(evaluation: Evaluation, output: Path, again: list[str]) -> None:
    """Every student beside the full sampler, its output cache, fitted plans and fewer steps."""
    known = json.loads(output.read_text())["rows"] if output.exists() else []
    kept = {row["name"]: row for row in known if row["checkpoint"] not in again}
    full = Setting(SHIPPED, "", 50)
    cached = [replace(full, stride=stride) for stride in (3, 5, 10, 20)]
    cached += [replace(full, fitted=one.plan) for one in read_plans(PLANS)]
    fewer = [replace(full, steps=steps) for steps in (17, 10, 5, 4, 3)]
    students = [
        own_setting(name, model.checkpoint)
        for name, model in evaluation.models.items()
        if name != SHIPPED
    ]
    assert evaluation.extractor
    real = read_real(REAL, evaluation.extractor, (64, 64), evaluation.store)
    wanted = [full, *fewer, *cached, *students]
    names = {one.name for one in wanted}
    for name in [name for name in kept if "fitted plan" in name and name not in names]:
        del kept[name]  # of plans that no longer ship
    for setting in tqdm([one for one in wanted if one.name not in kept]):
        opponent = None
        if not setting.plain or setting.model != SHIPPED:
            opponent = plain_at_equal_arithmetic(
                evaluation.models, evaluation.protocol, setting, full
            )
        row = make_row(evaluation, setting, full, full, opponent, real)
        errors = evaluation.compare_all(setting, full)["latent_error"]
        numbers = [float(f"{error:.5g}") for error in errors]
        kept[row.name] = {**asdict(row), "errors": numbers, "machine": describe_machine()}
    rows = [*kept.values()]
    content = {
        "machine": describe_machine(),
        "protocol": {
            "num_images": NUM_IMAGES,
            "guidance_scale": evaluation.protocol.guidance_scale,
            "num_prompts": len(evaluation.protocol.prompts),
            "extractor": evaluation.extractor.name,
            "training": {"common": COMMON, "students": STUDENTS},
        },
        "rows": rows,
        "with FCR less without": regularised_less_plain(rows, evaluation.protocol),
    }
    write_json(output, content)
    if FAST in evaluation.models:
        draw_side_by_side(evaluation, PICTURE)


def draw_side_by_side(evaluation: Evaluation, path: Path) -> None:
    """The first pictures: by the full sampler above, of the same noise by the student below."""
    student = own_setting(FAST, evaluation.models[FAST].checkpoint)
    first = evaluation.protocol.batches[0]
    above, below = (evaluation.pictures(one, first) for one in (Setting(SHIPPED, "", 50), student))
    rows = torch.cat([torch.cat([*pictures], dim=-1) for pictures in (above, below)], dim=-2)
    pixels = (rows.permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(pixels).save(path, optimize=True)


def regularised_less_plain(rows: list[dict], protocol: Protocol) -> list[float] | None:
    """Mean difference of the latent error with FCR and without, over pictures and seeds.

    Equal steps and seeds in pairs; with the 95 % interval over prompts.
    """
    errors = {row["checkpoint"]: torch.tensor(row["errors"]) for row in rows}
    pairs = [(f"short, FCR {seed}", f"short {seed}") for seed in SEEDS]
    if not all(name in errors for pair in pairs for name in pair):
        return None
    difference = torch.stack([errors[ours] - errors[theirs] for ours, theirs in pairs]).mean(0)
    prompts = protocol.prompts_of(range(protocol.num_images))
    return [difference.mean().item(), *map(float, bootstrap_interval(difference.numpy(), prompts))]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("train", "report"))
    parser.add_argument("--student", action="append", choices=tuple(STUDENTS), default=[])
    parser.add_argument("--store", type=Path, default=FOLDER / "store")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/shared.json"))
    options = parser.parse_args()
    if options.step == "train":
        train(options.student)
    else:
        report(open_evaluation(options.store), options.output, options.student)


if __name__ == "__main__":
    main()
