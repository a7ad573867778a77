"""The study behind docs/study.md: when does a cached encoder pay, and does FCR help?

    python benchmarks/study.py pictures --emoji-dir runs/emoji/data   # real pictures, captioned
    python benchmarks/study.py train --emoji-dir runs/emoji/data      # the fine-tuned variants
    python benchmarks/study.py sample                                 # hours on two cores; resumes
    python benchmarks/study.py report                                 # study.json and the plots

Everything lies in runs/study; a repeated command goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from encache.evaluate.extractors import load_extractor
from encache.evaluate.real import read_real
from encache.evaluate.report import strict
from encache.evaluate.results import Row
from encache.evaluate.rows import make_row, plain_at_equal_arithmetic
from encache.evaluate.sampling import Backend, Evaluation, Model
from encache.evaluate.settings import Protocol, Setting, read_prompts
from encache.evaluate.store import Store
from encache.model.checkpoint import default_model, find_checkpoint
from encache.runtime.files import write_atomically
from encache.runtime.machine import describe_machine
from encache.runtime.plan import PAPER_KEY_CALLS

FOLDER = Path("runs/study")
NUM_IMAGES = 512
GUIDANCE_SCALE = 3.0

#: Every variant is trained alike but for its loss, the control without any.
COMMON = {
    "--max-train-steps": "1000",
    "--train-batch-size": "32",
    "--learning-rate": "1e-4",
    "--lr-scheduler": "linear",
    "--snr-gamma": "5",
    "--ema-decay": "0.998",
    "--adam-weight-decay": "1e-3",
}
VARIANTS = {
    "control": {"--fcr-weight": "0"},
    "fcr10-raw": {"--fcr-delta-max": "10"},
    "fcr10-relative": {"--fcr-delta-max": "10", "--fcr-form": "relative"},
    "fcr200-raw": {"--fcr-delta-max": "200"},
    "fcr200-relative": {"--fcr-delta-max": "200", "--fcr-form": "relative"},
    "cached100": {"--fcr-weight": "0", "--cached-weight": "1", "--fcr-delta-max": "100"},
    "cached200": {"--fcr-weight": "0", "--cached-weight": "1", "--fcr-delta-max": "200"},
}
SHIPPED = "shipped"
DDIM, DPM = "ddim", "dpmsolver++"


def plain(steps: int, scheduler: str = DDIM, model: str = SHIPPED) -> Setting:
    """Every call in full."""
    return Setting(model, scheduler, steps)


def questions(variants: Sequence[str]) -> dict[str, tuple[Setting, Setting, list[Setting]]]:
    """For every question the reference, the full sampler, and the settings that answer it."""
    full = plain(50)
    mid, up2 = (replace(full, cut=cut) for cut in ("mid", "up2"))
    main = ("reuse", "extrapolate", "interpolate")
    more = ("extrapolate-damped", "extrapolate2", "interpolate-continued", "interpolate-refresh")
    paper = PAPER_KEY_CALLS[50]
    blends = [
        *(replace(mid, blend=b, stride=n) for n, b in product((2, 5, 10, 20), main)),
        *(replace(mid, blend=b, stride=n) for n, b in product((5, 10), more)),
        *(replace(up2, blend=b, stride=n) for n, b in product((2, 3, 5, 10, 20), main)),
        *(replace(up2, blend=b, stride=n) for n, b in product((5, 10), more)),
        *(replace(cut, blend=b, key_calls=paper) for cut, b in product((mid, up2), main[:2])),
    ]
    noise = [
        replace(cut, blend=b, stride=10, prior_noise=True)
        for cut, b in product((mid, up2), ("reuse", "extrapolate"))
    ]
    cuts = [replace(full, cut=cut, stride=n) for cut, n in product(("up0", "up1"), (5, 10))]
    few, converged = plain(20, DPM), plain(250, DPM)
    solver = [
        few,
        *(
            replace(few, cut=cut, blend=b, stride=n)
            for cut, b, n in product(("mid", "up2"), ("reuse", "extrapolate"), (2, 3, 5))
        ),
        *(replace(few, blend=b, key_calls=PAPER_KEY_CALLS[20]) for b in ("reuse", "extrapolate")),
    ]
    asked = {
        "blends": (full, full, [full, *blends]),
        "prior noise": (full, full, noise),
        "cuts": (full, full, cuts),
        "fewer steps": (full, full, [plain(steps) for steps in (40, 30, 25, 20, 17, 15, 10)]),
        "DPM-Solver++ against its own full run": (few, few, solver),
        "DPM-Solver++ against convergence": (converged, few, solver),
        "few DDIM steps": (
            plain(20),
            plain(20),
            [
                plain(20),
                *(
                    replace(plain(20), cut=cut, stride=n)
                    for cut, n in product(("mid", "up2"), (2, 3, 5))
                ),
            ],
        ),
    }
    for variant in variants:
        own, quick = plain(50, model=variant), plain(20, DPM, variant)
        keyed = [
            replace(own, cut="mid", blend="reuse", stride=5),
            *(replace(own, cut="mid", blend=b, stride=10) for b in ("reuse", "extrapolate")),
            *(replace(own, cut="up2", stride=n) for n in (3, 5, 10, 20)),
        ]
        asked[f"{variant} against its own full run"] = (own, own, [own, *keyed])
        asked[f"{variant} against the shipped model"] = (full, full, [own, *keyed])
        solved = [replace(quick, cut="up2", stride=n) for n in (2, 3, 5)]
        asked[f"{variant} with DPM-Solver++"] = (quick, quick, [quick, *solved])
    return asked


def weights_of(variant: str) -> Path:
    """Where `train` leaves a variant."""
    return FOLDER / variant / "fcr.safetensors"


def write_pictures(emoji_dir: Path) -> None:
    """The real pictures as a captioned folder, three poses of each."""
    from encache.train.emoji import CONCEPT_CATEGORIES, load_posed_image, read_emoji

    folder = FOLDER / "real"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index, one in enumerate(read_emoji(emoji_dir, CONCEPT_CATEGORIES)):
        for pose in range(3):
            name = f"{index:04d}-{pose}.png"
            load_posed_image(one, generator).save(folder / name)
            rows.append(json.dumps({"file_name": name, "text": one.captions[0]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def train(emoji_dir: Path, wanted: list[str]) -> None:
    """Run `encache-train fcr` for every variant that is not finished."""
    for name in wanted or VARIANTS:
        options = {**COMMON, **VARIANTS[name], "--output-dir": str(FOLDER / name)}
        words = [word for option in options.items() for word in option]
        command = [sys.executable, "-m", "encache.train.cli", "fcr", *words]
        subprocess.run([*command, "--train-data-dir", str(emoji_dir)], check=True)


def open_evaluation(num_images: int) -> Evaluation:
    """All models that exist, on the fastest backend of this machine."""
    gpu = torch.cuda.is_available()
    engines = FOLDER / "engines"
    backend = Backend("torch", device="cuda") if gpu else Backend("onnxruntime", engine_dir=engines)
    models = {SHIPPED: Model(find_checkpoint(), backend)}
    for variant in VARIANTS:
        if weights_of(variant).is_file():
            models[variant] = Model(find_checkpoint(weights_of(variant)), backend)
    prompts = tuple(read_prompts(default_model() / "prompts.txt"))
    protocol = Protocol(prompts, num_images, GUIDANCE_SCALE, batch_size=256 if gpu else 16)
    extractor = load_extractor("efficientnet-lite0", device="cuda" if gpu else "cpu")
    return Evaluation(models, protocol, Store(FOLDER / "store"), extractor)


def answers(
    evaluation: Evaluation,
) -> Iterator[tuple[str, Setting, Setting, dict[Setting, Setting | None]]]:
    """The questions; every cached setting comes with as many plain steps as it costs."""
    variants = [name for name in evaluation.models if name != SHIPPED]
    for question, (reference, full, settings) in questions(variants).items():
        opponents = {
            one: plain_at_equal_arithmetic(evaluation.models[one.model], evaluation.protocol, one)
            for one in settings
            if not one.plain
        }
        listed = [*settings, *opponents.values()]
        yield question, reference, full, {one: opponents.get(one) for one in listed}


def sample(evaluation: Evaluation) -> None:
    """Draw and measure everything, question by question."""
    for question, reference, _, settings in answers(evaluation):
        work = list(product(evaluation.protocol.batches, settings))
        for pictures, setting in tqdm(work, desc=question):
            evaluation.compare(setting, reference, pictures)


def report(evaluation: Evaluation, output: Path) -> None:
    """Gather all answers in one file, each picture's error included."""
    size = (64, 64)
    assert evaluation.extractor
    real = read_real(FOLDER / "real", evaluation.extractor, size, evaluation.store)
    rows = {
        question: [
            describe(
                evaluation,
                setting,
                reference,
                make_row(evaluation, setting, reference, full, opponent, real),
            )
            for setting, opponent in settings.items()
        ]
        for question, reference, full, settings in answers(evaluation)
    }
    content = {
        "machine": describe_machine(),
        "protocol": {
            "num_images": evaluation.protocol.num_images,
            "guidance_scale": GUIDANCE_SCALE,
            "num_prompts": len(evaluation.protocol.prompts),
            "extractor": evaluation.extractor.name,
            "backend": asdict(evaluation.models[SHIPPED].backend),
            "training": {"common": COMMON, "variants": VARIANTS},
        },
        "answers": rows,
    }
    write_atomically(output, json.dumps(strict(content), allow_nan=False).encode() + b"\n")


def describe(evaluation: Evaluation, setting: Setting, reference: Setting, row: Row) -> dict:
    """The row and the error of each picture, to five digits."""
    errors = evaluation.compare_all(setting, reference)["latent_error"]
    return {**asdict(row), "errors": [float(f"{error:.5g}") for error in errors]}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("pictures", "train", "sample", "report"))
    parser.add_argument("--emoji-dir", type=Path, default=Path("runs/emoji/data"))
    parser.add_argument("--variant", action="append", choices=tuple(VARIANTS), default=[])
    parser.add_argument("--num-images", type=int, default=NUM_IMAGES)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/study.json"))
    options = parser.parse_args()
    if options.step == "pictures":
        write_pictures(options.emoji_dir)
    elif options.step == "train":
        train(options.emoji_dir, options.variant)
    else:
        evaluation = open_evaluation(options.num_images)
        sample(evaluation)
        if options.step == "report":
            report(evaluation, options.output)


if __name__ == "__main__":
    main()
