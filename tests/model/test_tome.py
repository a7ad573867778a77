"""Merged tokens: equal to the tomesd package, at any size and cut, also when exported."""

from fractions import Fraction

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from encache.contract.manifest import ONNX, read_manifest
from encache.contract.target import Target
from encache.errors import CheckpointError
from encache.export.build import Request, build_engines
from encache.export.trt import Compiler, profile
from encache.model.checkpoint import find_checkpoint
from encache.model.loading import load_pipeline
from encache.model.merging import merge_tokens
from encache.model.spec import FEATURE_CUTS
from encache.model.split import Halves
from encache.runtime.cli import main
from encache.runtime.pipeline import EncachePipeline
from tests.conftest import tiny_unet
from tests.model.test_split import FAMILIES, draw


def merging_unet(ratio=0.5, **changes):
    unet = tiny_unet(**changes)
    merge_tokens(unet, Fraction(str(ratio)))
    return unet


def error(actual, expected):
    return (actual - expected).norm() / expected.norm()


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.74])
@pytest.mark.parametrize("size", [(16, 16), (9, 13), (16, 11), (11, 8)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_equals_tomesd(family, size, ratio):
    tomesd = pytest.importorskip("tomesd")
    plain, theirs = tiny_unet(**FAMILIES[family]), tiny_unet(**FAMILIES[family])
    tomesd.apply_patch(theirs, ratio=ratio, use_rand=False)
    latents, timestep, conditions = draw(*size)
    # In single precision rounding may decide which of two tokens is the nearer one.
    ours, expected, before = (
        one.double()(latents.double(), timestep, conditions["text"].double()).sample
        for one in (merging_unet(ratio, **FAMILIES[family]), theirs, plain)
    )
    assert error(ours, expected) < 1e-5
    assert error(before, expected) > 1e-4


@pytest.mark.parametrize("cut", FEATURE_CUTS)
@torch.no_grad()
def test_recomposition_is_bit_exact(cut):
    unet = merging_unet()
    latents, timestep, conditions = draw(13, 17)
    halves = Halves(unet, cut)
    ring = [one[None] for one in halves.encoder(latents, timestep, conditions)]
    noise = halves.decoder(ring, torch.ones(1, 1), timestep, conditions)
    assert torch.equal(noise, unet(latents, timestep, conditions["text"]).sample)


def test_exported_at_a_cut(slim_folder, tmp_path):
    """With merged tokens in both halves; the build itself tries other sizes than it traced."""
    request = Request(find_checkpoint(slim_folder, tome=0.5), "up2")
    folder = build_engines(request, tmp_path)
    manifest = read_manifest(folder)
    assert folder.name.startswith("tiny+tome0.5-")
    assert max(manifest.parity.values()) < 1e-4
    reference = EncachePipeline.from_pretrained(slim_folder, tome=0.5, cut="up2", backend="torch")
    plain = EncachePipeline.from_pretrained(slim_folder, cut="up2", backend="torch")
    told = {"num_inference_steps": 4, "stride": 2, "output_type": "latent"}
    told |= {"height": 24, "width": 40}
    pictures = [
        pipe("red apple", generator=torch.Generator().manual_seed(0), **told).images
        for pipe in (EncachePipeline.from_engines(folder), reference, plain)
    ]
    assert error(pictures[0], pictures[1]) < 1e-3
    assert error(pictures[2], pictures[1]) > 1e-3
    target = Target("any", ("8.9",), (1, 4), 5, (16, 32), (16, 48))
    for graph in manifest.graphs[:2]:
        compiler = Compiler("tensorrt-rtx", folder / graph.name / ONNX)
        shapes = profile(graph, target, manifest.spec, 16)
        assert compiler.compile(shapes, ["8.9"]).scratch_bytes > 0


def test_each_ratio_is_another_model(model_folder):
    ratios = (None, 0.5, 0.25)
    found = [find_checkpoint(model_folder, tome=ratio) for ratio in ratios]
    assert len({one.fingerprint for one in found}) == 3
    assert [one.name for one in found] == ["tiny", "tiny+tome0.5", "tiny+tome0.25"]


def test_refusals(model_folder, xl_folder):
    for ratio in (0, 0.75, -1, float("nan")):
        with pytest.raises(CheckpointError, match="less than 0.75 of the tokens"):
            find_checkpoint(model_folder, tome=ratio)
    with pytest.raises(CheckpointError, match="leave out --tome"):
        load_pipeline(find_checkpoint(xl_folder, tome=0.5))
    latents, timestep, conditions = draw(1, 8)
    with pytest.raises(CheckpointError, match="here are 1 by 8"):
        merging_unet()(latents, timestep, conditions["text"])


def test_by_the_command_line(model_folder, tmp_path):
    command = [
        *("--ckpt", str(model_folder), "--backend", "torch"),
        *("--prompt", "red apple", "--steps", "3", "--output"),
    ]
    pictures = []
    for name, more in (("a.png", ()), ("b.png", ("--tome", "0.5"))):
        result = CliRunner().invoke(main, [*command, str(tmp_path / name), *more])
        assert result.exit_code == 0, result.output
        pictures.append(Image.open(tmp_path / name).tobytes())
    assert pictures[0] != pictures[1]
    result = CliRunner().invoke(main, [*command, str(tmp_path), "--tome", "0.9"])
    assert result.exit_code == 1
    assert "not 0.9: try 0.5" in result.stderr
