"""An engine folder is complete, verified and unique, or it is not there."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from diffusers import AutoencoderTiny
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from encache.contract import manifest
from encache.contract.manifest import MANIFEST, read_manifest
from encache.errors import EngineError
from encache.export import build, graphs
from encache.export.build import Request, build_engines
from encache.export.graphs import pipeline_graphs, write_onnx
from encache.export.parity import measure_parity
from encache.model.checkpoint import find_checkpoint
from encache.model.spec import ImageSpec
from encache.runtime.pipeline import EncachePipeline

SIZES = {"B": 2, "K": 3, "L": 16, "M": 2, "h": 16, "w": 16}


@pytest.fixture
def copied(engine_folder, tmp_path):
    return shutil.copytree(engine_folder, tmp_path / engine_folder.name)


def test_folder_layout(engine_folder, up2_folder):
    expected = {
        "manifest.json",
        "model_index.json",
        "text_encoder",
        "vae_decoder",
        "scheduler",
        "tokenizer",
    }
    halves = {"unet_encoder", "unet_decoder"}
    assert {path.name for path in engine_folder.iterdir()} == expected | {"unet"}
    assert {path.name for path in up2_folder.iterdir()} == expected | halves
    assert [path.name for path in engine_folder.parent.iterdir() if path.is_dir()] == [
        engine_folder.name
    ]


def test_manifest_records_identity_and_parity(up2_folder, model_folder):
    read = read_manifest(up2_folder)
    assert up2_folder.name == f"tiny-{read.identity.key}"
    assert read.identity.model == find_checkpoint(model_folder).fingerprint
    assert set(read.parity) == {"unet_encoder", "unet_decoder", "text_encoder", "vae_decoder"}
    assert all(0 < error <= 1e-5 for error in read.parity.values())


def test_graphs_are_opset_23_with_free_dimensions(up2_folder):
    decoder = onnx.load(up2_folder / "unet_decoder" / "model.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in decoder.opset_import}[""] == 23
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in decoder.graph.input
    }
    assert shapes["hidden"] == ["M", "B", 16, "h", "w"]
    assert shapes["weights"] == ["K", "M"]
    assert shapes["timesteps"] == ["K"]
    operators = {node.op_type for node in decoder.graph.node}
    assert {"GroupNormalization", "Attention"} <= operators


@pytest.mark.parametrize("cut", ["mid", "up0", "up1"])
def test_every_other_cut_exports_with_parity_and_the_models_plans(slim_folder, tmp_path, cut):
    model = shutil.copytree(slim_folder, tmp_path / "model")
    (model / "plans.json").write_text("plans")
    folder = build_engines(Request(find_checkpoint(model), cut), tmp_path)
    assert (folder / "plans.json").read_text() == "plans"
    assert "plans.json" not in read_manifest(folder).files  # which may be exchanged
    assert [feature.name for feature in read_manifest(folder).features][-1] == "hidden"
    picture = EncachePipeline.from_engines(folder)(
        "red apple", num_inference_steps=4, stride=2, height=24, width=40
    )
    assert picture.images[0].size == (40, 24)


def test_fp16_exports_with_parity(fp16_folder, up2_folder):
    assert 1e-5 < read_manifest(fp16_folder).parity["unet_decoder"] < 1e-2
    weights = "unet_decoder/model.onnx.data"
    halved, whole = ((one / weights).stat().st_size for one in (fp16_folder, up2_folder))
    assert halved < 0.7 * whole
    images = EncachePipeline.from_engines(fp16_folder)("red apple", num_inference_steps=4, stride=2)
    assert images.images[0].size == (16, 16)


def test_parity_notices_a_wrong_graph(up2_folder, pipeline):
    graph = pipeline_graphs(pipeline, "up2")[1]
    path = up2_folder / "unet_decoder" / "model.onnx"
    assert measure_parity(graph, path, SIZES) < 1e-5
    pipeline.unet.conv_out.weight.data *= 1.01
    assert measure_parity(graph, path, SIZES) > 1e-3


def test_the_image_decoder_is_checked_on_latents_of_a_samplers_size(pipeline):
    picture = pipeline_graphs(pipeline, "none")[-1]
    latents = picture.draw(torch.Generator(), {"B": 64, "h": 32, "w": 32})["latents"]
    assert latents.std().item() == pytest.approx(1 / pipeline.vae.config.scaling_factor, rel=0.01)


def test_a_tiny_autoencoder_in_the_place_of_the_large_one(pipeline, tmp_path):
    pipeline.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    assert ImageSpec.of(pipeline.unet.config, pipeline.vae.config).downscale == 2
    picture = pipeline_graphs(pipeline, "none")[-1]
    path = write_onnx(picture, tmp_path, SIZES)
    assert measure_parity(picture, path, SIZES) < 1e-5


@pytest.mark.usefixtures("only_text_encoder")
def test_a_failed_parity_check_leaves_nothing(model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(build.PARITY_TOLERANCE, "fp32", 1e-12)
    with pytest.raises(EngineError, match="differs from PyTorch"):
        build_engines(Request(find_checkpoint(model_folder)), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_finished_export_is_not_repeated(engine_folder, model_folder, monkeypatch):
    monkeypatch.setattr(build, "_write_engines", None)  # would fail if it were called
    request = Request(find_checkpoint(model_folder))
    assert build_engines(request, engine_folder.parent) == engine_folder


@pytest.mark.usefixtures("only_text_encoder")
def test_a_full_disk_leaves_nothing(model_folder, tmp_path, monkeypatch):
    def fill(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build, "write_companions", fill)
    monkeypatch.setattr("encache.export.parity.measure_parity", lambda *_: 0.0)
    with pytest.raises(OSError, match="No space left") as refusal:
        build_engines(Request(find_checkpoint(model_folder)), tmp_path)
    assert refusal.value.filename == str(tmp_path)  # as the operating system does not say
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.usefixtures("only_text_encoder")
def test_every_part_is_named_before_it_takes_time(model_folder, tmp_path, monkeypatch):
    lines, seen = [], []
    whole = graphs.write_onnx
    monkeypatch.setattr(graphs, "write_onnx", lambda *a: seen.append(lines[-1]) or whole(*a))
    build_engines(Request(find_checkpoint(model_folder)), tmp_path, lines.append)
    assert lines[0] == "loading tiny"
    assert seen == ["exporting text_encoder"]
    assert lines[-1].startswith("checked text_encoder")


@pytest.mark.usefixtures("only_text_encoder")
def test_leftovers_of_a_killed_builder_are_removed(model_folder, tmp_path):
    request = Request(find_checkpoint(model_folder))
    leftover = tmp_path / f".{request.folder_name}-abc" / "engines"
    leftover.mkdir(parents=True)
    folder = build_engines(request, tmp_path)
    assert not leftover.exists()
    assert (folder / MANIFEST).is_file()


def test_two_builders_at_once_build_once(model_folder, tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from encache.export.build import Request, build_engines\n"
        "from encache.export import graphs\n"
        "from encache.model.checkpoint import find_checkpoint\n"
        "lines, whole = [], graphs.pipeline_graphs\n"
        "graphs.pipeline_graphs = lambda *a: whole(*a)[-2:-1]\n"
        "print(build_engines(Request(find_checkpoint(sys.argv[1])), Path(sys.argv[2]), "
        "lines.append)); print(sum('waiting' not in line for line in lines))"
    )
    command = [sys.executable, "-c", script, str(model_folder), str(tmp_path)]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [builder.communicate()[0].split() for builder in builders]
    assert outputs[0][0] == outputs[1][0]
    assert sorted(int(output[1]) for output in outputs) == [0, 3]


@pytest.mark.parametrize("name", ["unet/model.onnx.data", "vae_decoder/model.onnx"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_an_altered_engine_is_refused(copied, name, damage):
    path = copied / name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(EngineError, match=r"Delete the folder and run encache-export again"):
        EncachePipeline.from_engines(copied)


@pytest.mark.parametrize("part", ["tokenizer/tokenizer.json", "scheduler/scheduler_config.json"])
def test_altered_companions_are_refused(copied, part):
    content = (copied / part).read_text()
    (copied / part).write_text(content.replace("0", "1", 1))  # as long as before
    with pytest.raises(EngineError, match="is not what was built"):
        EncachePipeline.from_engines(copied)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_manifest_edited_by_one_byte_is_refused(engine_folder, place, byte):
    with tempfile.TemporaryDirectory() as parent:
        copied = Path(parent, "engine")
        shutil.copytree(engine_folder, copied)
        content = bytearray((copied / MANIFEST).read_bytes())
        place %= len(content)
        assume(content[place] != byte and not {content[place], byte} <= set(b" \n\t\r"))
        content[place] = byte
        (copied / MANIFEST).write_bytes(content)
        with pytest.raises(EngineError, match="damaged"):
            read_manifest(copied)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"graph_format": 99}, "graph format 99"), ({"backend": "tpu"}, "unknown backend 'tpu'")],
)
def test_engines_for_something_else_are_refused(copied, changes, reason):
    read = read_manifest(copied)
    replace(read, identity=replace(read.identity, **changes)).write(copied)
    with pytest.raises(EngineError, match=reason):
        EncachePipeline.from_engines(copied)


@pytest.mark.parametrize("content", ["", "[]", "3", "{}"])
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(EngineError, match="damaged"):
        read_manifest(tmp_path)


def test_not_an_engine_folder(tmp_path):
    with pytest.raises(EngineError, match="not an engine folder"):
        EncachePipeline.from_engines(tmp_path)


def test_the_key_follows_every_part_of_the_identity(model_folder):
    request = Request(find_checkpoint(model_folder))
    variants = [
        request,
        replace(request, cut="mid"),
        replace(request, dtype="fp16"),
    ]
    identity = request.identity
    keys = {one.identity.key for one in variants}
    keys |= {replace(identity, **{name: "other"}).key for name in ("model", "tools")}
    assert len(keys) == 5


def test_external_weights_are_hashed(engine_folder):
    files = manifest.read_manifest(engine_folder).files
    assert "unet/model.onnx.data" in files
    assert MANIFEST not in files
