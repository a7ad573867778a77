"""8 bits: scales from what the model draws, layers chosen by their errors, datatypes read back."""

import hashlib
import json
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from encache.contract.calibration import Calibration, make_calibration
from encache.contract.manifest import MANIFEST, ONNX, Identity, read_manifest
from encache.contract.target import Target
from encache.errors import EncacheError, EngineError
from encache.export import build
from encache.export.build import Request, build_engines
from encache.export.calibrate import Layer, Observed, Trajectories, observe_shapes, round_to
from encache.export.cli import main
from encache.export.graphs import pipeline_graphs, write_onnx
from encache.export.parity import measure_error
from encache.export.quantize import choose_kept, expected_error, quantize, scale_of
from encache.export.trt import Compiler, profile
from encache.model.checkpoint import find_checkpoint
from encache.model.spec import ImageSpec
from encache.runtime.pipeline import EncachePipeline
from tests.conftest import make_pipeline

RTX = "tensorrt-rtx"
CALIBRATION = Calibration(("red apple", "hot dog"), steps=4, samples=6, kept_share=0.1)
SIZES = {"B": 2, "K": 3, "L": 16, "M": 2, "h": 16, "w": 16}
#: Wide enough for kernels of 8 bits, at a size at which attention has 64 keys.
WIDE = {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 2, "norm_num_groups": 8}


def target(*gpus):
    return Target("any", gpus or ("8.9",), (2, 2), 2, (16, 16), (16, 16))


@pytest.fixture(scope="module")
def drawn():
    """A model in fp32 and what it was seen doing while it drew."""
    pipeline = make_pipeline(**WIDE)
    return pipeline, Trajectories(pipeline, CALIBRATION, 3.0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Its whole denoiser, the decoder behind up2 and the image decoder in fp16, by name."""
    pipeline = make_pipeline(**WIDE).to(torch.float16)
    whole, _, picture = pipeline_graphs(pipeline, "none")
    paths = {}
    for graph in (whole, picture, pipeline_graphs(pipeline, "up2")[1]):
        folder = tmp_path_factory.mktemp(graph.spec.name)
        paths[graph.spec.name] = write_onnx(graph, folder, SIZES), graph
    return paths


def copy_of(path, folder):
    for file in path.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / ONNX


def compile_(path, graph, *gpus):
    pipeline = make_pipeline(**WIDE)
    spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
    sizes = profile(graph.spec, target(*gpus), spec, 16)
    return Compiler(RTX, path).compile(sizes, gpus or ("8.9",), detailed=True)


def observe(drawn, cut, dtype):
    pipeline, trajectories = drawn
    return trajectories.observe(pipeline_graphs(pipeline, cut), dtype)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_the_error_of_a_layer_is_what_quantising_it_alone_costs(drawn, dtype):
    pipeline = drawn[0]
    many = replace(CALIBRATION, steps=8, samples=48)
    graphs = pipeline_graphs(pipeline, "none")
    observed = Trajectories(pipeline, many, 3.0).observe(graphs[:1], dtype)["unet"]
    module = graphs[0].module
    for name in ("conv_in", "up_blocks.3.resnets.1.conv2", "mid_block.attentions.0.proj_in"):
        path = f"module.module.{name}"
        layer, known = module.get_submodule(path), observed.layers[path]
        exact, (maximum,) = layer.weight.data, known.maxima
        layer.weight.data = round_to(exact, exact.abs().max().item(), dtype)
        handle = layer.register_forward_pre_hook(
            lambda _, given, maximum=maximum: (round_to(given[0], maximum, dtype),)
        )
        with torch.no_grad():
            squares = [
                ((module(inputs) - expected).norm() / expected.norm()).item() ** 2
                for inputs, (expected,) in observed.samples
            ]
        handle.remove()
        layer.weight.data = exact
        # Random projections of 48 samples with two rows: a tenth, and what is not of first order.
        assert known.error**0.5 == pytest.approx(np.mean(squares) ** 0.5, rel=0.35)


def test_maxima_are_those_of_all_calls(drawn):
    pipeline = drawn[0]
    largest = 0.0

    def note(_, given):
        nonlocal largest
        largest = max(largest, given[0].abs().max().item())

    handle = pipeline.unet.conv_in.register_forward_pre_hook(note)
    Trajectories(pipeline, CALIBRATION, 3.0)
    handle.remove()
    layers = observe(drawn, "none", "int8")["unet"].layers
    assert layers["module.module.conv_in"].maxima == (largest,)
    halves = observe(drawn, "up2", "int8")
    assert halves["unet_encoder"].layers["module.module.conv_in"].maxima == (largest,)
    # Extrapolated features may be larger than any that was computed.
    last = "module.module.up_blocks.3.resnets.0.conv_shortcut"
    assert halves["unet_decoder"].layers[last].maxima >= layers[last].maxima


def test_shapes_alone_tell_what_a_run_computes(drawn):
    observed = observe(drawn, "up2", "int8")
    pipeline = make_pipeline(**WIDE)
    pipeline.unet.to("meta")
    for graph in pipeline_graphs(pipeline, "up2")[:2]:
        known = observed[graph.spec.name]
        found = observe_shapes(graph, {**SIZES, "K": 2, "h": 8, "w": 8})
        assert found.flop == known.flop
        assert {path: one.flop for path, one in found.layers.items()} == {
            path: one.flop for path, one in known.layers.items()
        }
        assert {one.is_attention for one in found.layers.values()} == {False, True}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("unet", "int8"), ("unet", "fp8"), ("unet_decoder", "int8"), ("vae_decoder", "int8")],
)
def test_all_that_is_meant_to_compiles_in_8_bits(drawn, exported, tmp_path, name, dtype):
    path, graph = exported[name]
    observed = observe(drawn, "up2" if name == "unet_decoder" else "none", dtype)[name]
    copy = copy_of(path, tmp_path)
    quantized = quantize(copy, observed, choose_kept(observed, 0.0, True), dtype)
    for one in onnx.load(copy).graph.initializer:
        assert not one.name.endswith(("/scale", "/zero")) or not one.dims
    error = measure_error(graph, copy, observed.samples)
    assert error == pytest.approx(expected_error(observed, quantized.kept), rel=0.5)
    judged = quantized.judge(compile_(copy, graph).layers)
    assert not judged.fallen_back
    assert judged.share > 0.9


def test_a_scale_with_a_dimension_is_noticed(drawn, exported, tmp_path):
    observed = observe(drawn, "none", "int8")["unet"]
    path, graph = exported["unet"]
    copy = copy_of(path, tmp_path)
    quantized = quantize(copy, observed, frozenset(), "int8")
    model = onnx.load(copy)
    for one in model.graph.initializer:
        if one.name.endswith(("/scale", "/zero")):
            one.dims.append(1)
    onnx.save(model, copy)
    judged = quantized.judge(compile_(copy, graph).layers)
    convolutions = {name for name in judged.fallen_back if "conv" in name}
    assert "module.module.up_blocks.3.resnets.1.conv1" in convolutions
    assert judged.share < 0.5


def test_int8_on_a_gpu_without_fp8_leaves_attention(drawn, exported, tmp_path):
    observed = observe(drawn, "none", "int8")["unet"]
    path, graph = exported["unet"]
    copy = copy_of(path, tmp_path)
    attention = {name for name, one in observed.layers.items() if one.is_attention}
    kept = choose_kept(observed, 0.0, False)
    assert kept == attention != set()
    judged = quantize(copy, observed, kept, "int8").judge(compile_(copy, graph, "8.6").layers)
    assert not judged.fallen_back


def test_what_is_kept_costs_most_for_its_arithmetic():
    layers = {
        "dear": Layer((1.0,), 50, 0.5),
        "small": Layer((1.0,), 1, 0.1),
        "cheap": Layer((1.0,), 40, 0.01),
        "silent": Layer((0.0,), 8),
        "attention": Layer((1.0, 1.0, 1.0), 1),
    }
    observed = Observed(layers, 100, ())
    assert choose_kept(observed, 0.0, True) == {"silent"}
    assert choose_kept(observed, 0.0, False) == {"silent", "attention"}
    assert choose_kept(observed, 0.1, True) == {"silent", "small"}
    assert choose_kept(observed, 0.6, True) == {"silent", "small", "dear"}
    assert expected_error(observed, {"dear", "cheap"}) == pytest.approx(0.1**0.5)


@given(st.floats(1e-7, 6e4), st.sampled_from(["int8", "fp8"]))
def test_no_value_up_to_the_maximum_is_cut_off(maximum, dtype):
    scale = scale_of(maximum, dtype)
    assert scale >= np.finfo(np.float16).tiny
    assert float(scale) * {"int8": 127, "fp8": 448}[dtype] >= maximum
    assert float(scale) <= max(1.001 * maximum / 100, np.finfo(np.float16).tiny)


def test_an_engine_folder_of_8_bits(slim_folder, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\n\nhot dog\n")
    monkeypatch.setattr("encache.contract.calibration._STEPS", 3)
    command = ["--ckpt", str(slim_folder), "--backend", RTX, "--gpu", "rtx-4090"]
    command += ["--dtype", "int8", "--calibration-prompts", str(prompts)]
    command += ["--engine-dir", str(tmp_path / "engines")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    again = CliRunner().invoke(main, command)
    assert "Nothing to do" in again.stderr
    (folder,) = (path.parent for path in tmp_path.glob(f"engines/*/{MANIFEST}"))
    manifest = read_manifest(folder)
    assert manifest.identity.calibration == Calibration(("red apple", "hot dog"), 3)
    assert manifest.identity.calibration == make_calibration(find_checkpoint(slim_folder), prompts)
    unet = manifest.eight_bits["unet"]
    assert 0 < unet.share <= 1
    assert f"unet computes {unet.share:.1%} of its arithmetic in 8 bits" in result.stderr
    for layer in unet.fallen_back:
        assert f"{layer} was meant to compute in 8 bits, and does not" in result.stderr
    assert unet.kept
    assert unet.maxima["module.module.conv_in"] > 1
    assert 1e-3 < manifest.parity["unet"] < 0.1


def test_too_large_an_error_is_refused(slim_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(build.PARITY_TOLERANCE, "int8", 1e-5)
    request = Request(find_checkpoint(slim_folder), "none", "int8", RTX, target(), CALIBRATION)
    with pytest.raises(EngineError, match=r"In int8, unet differs .* try --dtype fp16"):
        build_engines(request, tmp_path)


def test_the_key_follows_the_calibration_and_old_folders_keep_theirs(model_folder):
    request = Request(find_checkpoint(model_folder), "none", "int8", RTX, target(), CALIBRATION)
    keys = {request.identity.key}
    for changes in ({"prompts": ("a",)}, {"steps": 5}, {"samples": 7}, {"kept_share": 0.2}):
        other = replace(request, calibration=replace(CALIBRATION, **changes))
        keys.add(other.identity.key)
    assert len(keys) == 5
    plain = Identity("model", "mid", "fp16", "onnxruntime", "tools")
    since = {"calibration", "pipeline", "frames"}  # fields that folders then had not
    known = {name: one for name, one in asdict(plain).items() if name not in since}
    text = json.dumps(known, sort_keys=True)
    assert plain.key == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_a_folder_from_before_calibrations_is_read(engine_folder, tmp_path):
    data = json.loads((engine_folder / MANIFEST).read_text())
    del data["identity"]["calibration"], data["eight_bits"], data["digest"]
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    for file in data["files"]:
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).symlink_to(engine_folder / file)
    (tmp_path / MANIFEST).write_text(json.dumps({**data, "digest": digest}))
    assert read_manifest(tmp_path) == read_manifest(engine_folder)


def test_refusals(model_folder, tmp_path):
    checkpoint = find_checkpoint(model_folder)
    with pytest.raises(EngineError, match=r"FP8 begins with compute capability 8.9, .* 8.6"):
        Request(checkpoint, "none", "fp8", RTX, target("8.6", "8.9"), CALIBRATION)
    with pytest.raises(EncacheError, match="need a calibration"):
        Request(checkpoint, "none", "int8", RTX, target())
    for backend in ("torch", "onnxruntime"):
        with pytest.raises(EncacheError, match="not int8"):
            EncachePipeline.from_checkpoint(checkpoint, backend=backend, dtype="int8")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    eight = ["--ckpt", str(model_folder), "--backend", RTX, "--gpu", "rtx-4090", "--dtype", "int8"]
    for arguments, code, word in [
        (eight, 1, "--calibration-prompts"),
        ([*eight, "--calibration-prompts", str(empty)], 1, "--calibration-prompts"),
        ([*eight[:4], "--gpu", "rtx-3090", "--dtype", "fp8"], 1, "--calibration-prompts"),
        (["--dtype", "int8"], 1, "onnxruntime takes --dtype fp32 or fp16, not int8"),
        (["--calibration-prompts", str(empty)], 2, "means nothing"),
        (["--backend", RTX, "--gpu", "rtx-3090", "--dtype", "fp8"], 1, "FP8 begins with"),
    ]:
        result = CliRunner().invoke(main, [*arguments, "--engine-dir", str(tmp_path)])
        assert result.exit_code == code, result.output
        assert word in result.stderr.strip().splitlines()[-1]
