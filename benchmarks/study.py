"""The study behind docs/study.md: when does a cached encoder pay, and does FCR help?

    python benchmarks/study.py pictures     # real pictures, captioned; fetched with npm
    python benchmarks/study.py train        # the fine-tuned variants: hours on two cores
    python benchmarks/study.py sample       # likewise
    python benchmarks/study.py report       # benchmarks/study.json
    python benchmarks/pages.py              # tables and plots

Everything lies in runs/study; a repeated command goes on where it stopped.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from encache.evaluate.extractors import load_extractor
from encache.evaluate.machine import describe_machine
from encache.evaluate.real import read_real
from encache.evaluate.report import strict
from encache.evaluate.rows import make_row, plain_at_equal_arithmetic
from encache.evaluate.sampling import Backend, Evaluation, Model
from encache.evaluate.settings import Protocol, Setting, read_prompts
from encache.evaluate.store import Store
from encache.files import write_atomically
from encache.model.checkpoint import Checkpoint, default_model, find_checkpoint
from encache.model.spec import CUTS, NO_CUT, Cut
from encache.model.split import Halves
from encache.model.text import tokenize
from encache.runtime.blend import Blend
from encache.runtime.key_calls import PAPER_KEY_CALLS
from encache.train.diffusion import add_noise
from encache.train.fcr import Form, consistency, mean_square, spread

FOLDER = Path("runs/study")
NUM_IMAGES = 512
NUM_DRIFT = 4

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
MID = {"--cut": "mid"}
CACHED = {"--fcr-weight": "0", "--cached-weight": "1"}
VARIANTS = {
    "control": {"--fcr-weight": "0"},
    "fcr10-raw": {**MID, "--fcr-delta-max": "10"},
    "fcr200-raw": {**MID, "--fcr-delta-max": "200"},
    "fcr200-relative": {**MID, "--fcr-delta-max": "200", "--fcr-form": "relative"},
    "fcr200-spread": {**MID, "--fcr-delta-max": "200", "--fcr-form": "spread"},
    "fcr200-spread-10": {
        **MID,
        "--fcr-delta-max": "200",
        "--fcr-form": "spread",
        "--fcr-weight": "10",
    },
}
SHIPPED = "shipped"
#: The shipped model with "trailing" timesteps; and for DPM-Solver++, which would go on to a noise
#: level of zero, one that ends where DDIM does.
TRAILING, TRAILING_DPM = "trailing", "trailing-sigma-min"
DDIM, DPM = "ddim", "dpmsolver++"
#: Cuts that save enough to be held against fewer steps.
DEEP: tuple[Cut, ...] = ("up2", NO_CUT)
FEWER_STEPS = (40, 30, 25, 20, 17, 10, 5)
#: Where pictures are also compared with real ones, as every model's full runs are. It takes long.
WITH_REAL = ("plain sampling with fewer steps", "where to cut")
#: Of the pairs whose features are compared, in training timesteps.
DELTAS = (10, 20, 100, 200)


def plain(steps: int, scheduler: str = DDIM, model: str = SHIPPED) -> Setting:
    """Every call in full."""
    return Setting(model, scheduler, steps)


#: What a question compares: the reference of its errors, the full sampler, and the settings.
Question = tuple[Setting, Setting, list[Setting]]


def questions(variants: Sequence[str]) -> dict[str, Question]:
    """All questions by name."""
    full, few, few_dpm = plain(50), plain(20), plain(20, DPM)
    return {
        "plain sampling with fewer steps": (full, full, [full, *map(plain, FEWER_STEPS)]),
        "where to cut": (full, full, _cuts(full)),
        "which blend": (full, full, _blends(full)),
        "prior noise": (full, full, _prior_noise(full)),
        "few DDIM steps": (few, few, _few(few)),
        "few DPM-Solver++ steps": (few_dpm, few_dpm, _few(few_dpm)),
        "the same start": _same_start(),
        "against convergence": _convergence(),
        **{f"{one} against its own full run": _variant(one, own=True) for one in variants},
        **{f"{one} against the shipped model": _variant(one, own=False) for one in variants},
    }


def _cuts(full: Setting) -> list[Setting]:
    return [*_strided(full, [NO_CUT], (2, 3)), *_strided(full, CUTS, (5, 10))]


def _blends(full: Setting) -> list[Setting]:
    """At the cut of the method's authors, and at the cheapest."""
    mid, output = replace(full, cut="mid"), replace(full, cut=NO_CUT)
    common: tuple[Blend, ...] = ("reuse", "extrapolate", "interpolate")
    paper = PAPER_KEY_CALLS[full.steps]
    return [
        *(replace(mid, blend=b, stride=n) for n, b in product((5, 10), common)),
        replace(mid, blend="interpolate-refresh", stride=10),
        replace(mid, blend="reuse", key_calls=paper),
        *(replace(output, blend=b, stride=n) for n, b in product((2, 3, 5, 10, 20), common)),
        replace(output, blend="interpolate-refresh", stride=10),
        *(replace(output, blend=b, key_calls=paper) for b in common[:2]),
    ]


def _prior_noise(full: Setting) -> list[Setting]:
    noisy = replace(full, stride=10, prior_noise=True)
    return [
        replace(noisy, cut="mid", blend="reuse"),
        *(replace(noisy, cut=NO_CUT, blend=blend) for blend in ("reuse", "extrapolate")),
    ]


def _strided(full: Setting, cuts: Sequence[Cut], strides: Sequence[int]) -> list[Setting]:
    return [replace(full, cut=cut, stride=n) for cut, n in product(cuts, strides)]


def _few(full: Setting) -> list[Setting]:
    ahead = replace(full, blend="interpolate")
    strides = (2, 3, 5)
    return [full, *_strided(full, DEEP, strides), *_strided(ahead, [NO_CUT], strides)]


def _same_start() -> Question:
    """Fewer steps once more, with timesteps that begin at the same one for any number.

    "Leading" timesteps, Stable Diffusion's own, begin elsewhere for every number of steps, so that
    the same noise leads to another picture; "trailing" ones always begin at the last.
    """
    full = plain(50, model=TRAILING)
    ahead = replace(full, blend="interpolate")
    cached = [*_strided(full, [NO_CUT], (2, 3, 5, 10)), *_strided(ahead, [NO_CUT], (2, 3, 5))]
    return full, full, [full, *cached]


def _convergence() -> Question:
    """Errors against the solved differential equation, to which solvers tend from one start."""
    ddim, dpm = plain(50, DDIM, TRAILING), plain(50, DPM, TRAILING_DPM)
    cached = [replace(one, cut=NO_CUT, stride=n) for one, n in product((ddim, dpm), (2, 3, 5))]
    return plain(250, DPM, TRAILING_DPM), ddim, [ddim, dpm, *cached]


def _variant(name: str, own: bool) -> Question:
    """A fine-tuned model beside itself or beside the model that it was made from."""
    full = plain(50, model=name)
    mid = replace(full, cut="mid", stride=10)
    at_mid = [replace(mid, blend=blend) for blend in ("reuse", "extrapolate")]
    return full if own else plain(50), full, [full, *at_mid, *_strided(full, [NO_CUT], (5, 10))]


def weights_of(variant: str) -> Path:
    """Where `train` leaves a variant."""
    return FOLDER / variant / "fcr.safetensors"


def write_pictures(emoji_dir: Path) -> None:
    """The real pictures as a captioned folder, three poses of each; fetched when missing."""
    from encache.train.emoji import (
        CONCEPT_CATEGORIES,
        fetch_packages,
        load_posed_image,
        read_emoji,
    )

    fetch_packages(emoji_dir)
    folder = FOLDER / "real"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index, one in enumerate(read_emoji(emoji_dir, CONCEPT_CATEGORIES)):
        for pose in range(3):
            name = f"{index:04d}-{pose}.png"
            picture = load_posed_image(one, generator)
            if not (folder / name).exists():  # its time is part of the key of its features
                picture.save(folder / name)
            rows.append(json.dumps({"file_name": name, "text": one.captions[0]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def train(emoji_dir: Path, wanted: list[str]) -> None:
    """Run `encache-train fcr` for every variant that is not finished."""
    for name in wanted or VARIANTS:
        options = {**COMMON, **VARIANTS[name], "--output-dir": str(FOLDER / name)}
        words = [word for option in options.items() for word in option]
        command = [sys.executable, "-m", "encache.train.cli", "fcr", *words]
        subprocess.run([*command, "--train-data-dir", str(emoji_dir)], check=True)


def rescheduled(name: str, **changes: object) -> Checkpoint:
    """The shipped model with another scheduler configuration, written once."""
    folder = FOLDER / name
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
            copy = shutil.copytree(default_model(), Path(temporary, name))
            path = copy / "scheduler" / "scheduler_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
            copy.rename(folder)
    return find_checkpoint(folder)


def open_evaluation(num_images: int) -> Evaluation:
    """All models that exist, on the fastest backend of this machine."""
    gpu = torch.cuda.is_available()
    engines = FOLDER / "engines"
    backend = Backend("torch", device="cuda") if gpu else Backend("onnxruntime", engine_dir=engines)
    trailing = {"timestep_spacing": "trailing", "steps_offset": 0}
    models = {
        SHIPPED: Model(find_checkpoint(), backend),
        TRAILING: Model(rescheduled(TRAILING, **trailing), backend),
        TRAILING_DPM: Model(
            rescheduled(TRAILING_DPM, **trailing, final_sigmas_type="sigma_min"), backend
        ),
    }
    for variant in VARIANTS:
        if weights_of(variant).is_file():
            models[variant] = Model(find_checkpoint(weights_of(variant)), backend)
    prompts = tuple(read_prompts(default_model() / "prompts.txt"))
    scale = find_checkpoint().guidance_scale
    protocol = Protocol(prompts, num_images, scale, batch_size=256 if gpu else 16)
    extractor = load_extractor("efficientnet-lite0", device="cuda" if gpu else "cpu")
    return Evaluation(models, protocol, Store(FOLDER / "store"), extractor)


def answers(
    evaluation: Evaluation,
) -> Iterator[tuple[str, Setting, Setting, dict[Setting, Setting | None]]]:
    """The questions; the shipped model's deep cuts come with as many plain steps as they cost."""
    variants = [name for name in evaluation.models if name in VARIANTS]
    for question, (reference, full, settings) in questions(variants).items():
        opponents = {
            one: plain_at_equal_arithmetic(
                evaluation.models,
                evaluation.protocol,
                one,
                plain(one.steps, one.scheduler, one.model),
            )
            for one in settings
            if not one.plain and one.cut in DEEP and one.model not in VARIANTS
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
    without = Evaluation(evaluation.models, evaluation.protocol, evaluation.store)
    rows: dict[str, list[dict]] = {}
    for question, reference, full, settings in answers(evaluation):
        rows[question] = []
        for setting, opponent in tqdm(settings.items(), desc=question):
            compared = question in WITH_REAL or setting == plain(50, model=setting.model)
            measure, pictures = (evaluation, real) if compared else (without, None)
            row = make_row(measure, setting, reference, full, opponent, pictures)
            rows[question].append({**asdict(row), "errors": errors(measure, setting, reference)})
    content = {
        "machine": describe_machine(),
        "protocol": {
            "num_images": evaluation.protocol.num_images,
            "guidance_scale": evaluation.protocol.guidance_scale,
            "num_prompts": len(evaluation.protocol.prompts),
            "extractor": evaluation.extractor.name,
            "backend": asdict(evaluation.models[SHIPPED].backend),
            "training": {"common": COMMON, "variants": VARIANTS},
        },
        "answers": rows,
        "features": features(evaluation),
        "drift": asdict(evaluation.drift(plain(50), NUM_DRIFT)),
    }
    write_atomically(output, json.dumps(strict(content), allow_nan=False).encode() + b"\n")


def errors(evaluation: Evaluation, setting: Setting, reference: Setting) -> list[float]:
    """Of each picture, to five digits."""
    found = evaluation.compare_all(setting, reference)["latent_error"]
    return [float(f"{error:.5g}") for error in found]


def features(evaluation: Evaluation) -> dict[str, dict]:
    """`features_of` every model, on noised pictures of the shipped one."""
    pictures = evaluation.protocol.batches[0]
    clean = torch.from_numpy(evaluation.latents(plain(50), pictures)["latents"])
    prompts = evaluation.protocol.prompts_of(pictures)
    return {
        name: features_of(model.diffusers, clean, prompts)
        for name, model in evaluation.models.items()
        if name not in (TRAILING, TRAILING_DPM)
    }


@torch.no_grad()
def features_of(pipeline: StableDiffusionPipeline, clean: Tensor, prompts: list[str]) -> dict:
    """How large the features are, and how much they change: did anything collapse?

    Features of the cut "mid", with the same noise at both timesteps of a pair: mean squares and
    variances over the pixels by tensor, and squared changes relative to either by distance, the
    mean over tensors.
    """
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    text = pipeline.text_encoder(tokenize(pipeline.tokenizer, prompts).to(pipeline.device))[0]
    alphas_cumprod = pipeline.scheduler.alphas_cumprod
    halves = Halves(pipeline.unet, "mid")

    def encode(timestep: int) -> Sequence[Tensor]:
        at = torch.tensor([timestep])
        noisy = add_noise(clean, noise, alphas_cumprod[at])
        device = pipeline.device
        return halves.encoder(noisy.to(device), at.to(device), {"text": text})

    older = {t: encode(t) for t in range(max(DELTAS), len(alphas_cumprod), 100)}
    pairs = {delta: [(one, encode(t - delta)) for t, one in older.items()] for delta in DELTAS}

    def by_tensor(size: Callable[[Tensor], Tensor]) -> dict[str, float]:
        sizes = [[size(one).mean().item() for one in tensors] for tensors in older.values()]
        names = [one.name for one in halves.features]
        return dict(zip(names, np.mean(sizes, axis=0).tolist(), strict=True))

    def by_distance(form: Form) -> dict[str, float]:
        return {
            str(delta): float(np.mean([consistency(*pair, form, "none").item() for pair in some]))
            for delta, some in pairs.items()
        }

    return {
        "mean_square": by_tensor(mean_square),
        "spread": by_tensor(spread),
        "relative_change": by_distance("relative"),
        "spread_change": by_distance("spread"),
    }


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
