"""TensorRT-RTX itself compiles for GPUs that are not here, and its reading is checked."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner

from encache.contract import library, target
from encache.contract.library import describe_library, load_library
from encache.contract.manifest import ENGINE, ONNX, read_manifest, read_verified
from encache.contract.target import Target, parse_span, resolve_compute_capabilities
from encache.errors import EngineError
from encache.evaluate.bench_cli import main as bench
from encache.export.build import Request, find_covering_engines, find_engines
from encache.export.cli import main
from encache.export.graphs import pipeline_graphs, write_onnx
from encache.export.trt import Compiler, profile
from encache.model.checkpoint import find_checkpoint
from encache.model.spec import ImageSpec
from encache.runtime import trt
from encache.runtime.cli import main as run
from encache.runtime.pipeline import EncachePipeline
from tests.conftest import make_pipeline, make_xl_pipeline
from tests.model.test_vae import tiny_autoencoder

RTX = "tensorrt-rtx"
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The default model for two GPUs, with sizes to choose from."""
    engine_dir = tmp_path_factory.mktemp("compiled")
    options = ["--backend", RTX, "--gpu", "rtx-4090", "--gpu", "rtx-5090", "--cut", "up2"]
    options += ["--batch", "1:2", "--width", "64:128", "--engine-dir", str(engine_dir)]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    folder = result.stdout.splitlines()[-1]
    again = CliRunner().invoke(main, options)
    assert "Nothing to do" in again.stderr
    assert again.stdout == f"{folder}\n"
    return Path(folder)


def graphs_of(cut):
    pipeline = make_pipeline().to(torch.float16)
    spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
    return pipeline_graphs(pipeline, cut), spec


def test_the_default_model_for_two_gpus(compiled):
    manifest = read_manifest(compiled)
    assert manifest.identity.dtype == "fp16"
    assert manifest.identity.target == Target(
        describe_library(RTX), ("8.9", "12.0"), (1, 4), 10, (64, 64), (64, 128)
    )
    graphs = {"unet_encoder", "unet_decoder", "text_encoder", "vae_decoder"}
    assert set(manifest.parity) == set(manifest.scratch_bytes) == graphs
    assert all(2**20 < bytes_ < 2**28 for bytes_ in manifest.scratch_bytes.values())
    assert {name for name in manifest.files if name.split("/")[0] in graphs} == {
        f"{graph}/{ENGINE}" for graph in graphs
    }
    for name, record in manifest.files.items():
        assert len(read_verified(compiled, manifest, name)) == record.size


def test_the_library_reads_what_was_exported(fp16_folder):
    library = load_library(RTX)
    dtypes = {
        library.DataType.HALF: onnx.TensorProto.FLOAT16,
        library.DataType.FLOAT: onnx.TensorProto.FLOAT,
        library.DataType.INT64: onnx.TensorProto.INT64,
    }
    for graph in graphs_of("up2")[0]:
        path = fp16_folder / graph.spec.name / ONNX
        ours = onnx.load(path, load_external_data=False).graph
        compiler = Compiler(RTX, path)
        assert tuple(compiler.inputs) == tuple(one.name for one in graph.spec.inputs)
        assert tuple(compiler.outputs) == tuple(one.name for one in graph.spec.outputs)
        read = {**compiler.inputs, **compiler.outputs}
        for value in (*ours.input, *ours.output):
            tensor = value.type.tensor_type
            assert dtypes[read[value.name].dtype] == tensor.elem_type
            if value.name in compiler.inputs:
                shape = tuple(-1 if one.dim_param else one.dim_value for one in tensor.shape.dim)
                assert tuple(read[value.name].shape) == shape


def test_profiles_follow_the_target():
    graphs, spec = graphs_of("up2")
    target = Target("any", ("8.9",), (1, 4), 5, (16, 16), (16, 32))
    encoder, decoder, text, picture = (profile(one.spec, target, spec, 16) for one in graphs)
    assert encoder["latents"] == ((1, 4, 8, 8), (4, 4, 8, 16), (4, 4, 8, 16))
    assert encoder["timestep"] == ((1,), (1,), (1,))
    assert decoder["weights"] == ((1, 1), (5, 2), (5, 2))
    assert decoder["hidden"] == ((1, 1, 16, 8, 8), (2, 4, 16, 8, 16), (2, 4, 16, 8, 16))
    assert text["token_ids"] == ((1, 16), (4, 16), (4, 16))
    assert picture["latents"] == ((1, 4, 8, 8), (1, 4, 8, 16), (1, 4, 8, 16))


def test_both_text_encoders_take_one_prompt_alone():
    pipeline = make_xl_pipeline()
    spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
    target = Target("any", ("8.9",), (2, 2), None, (16, 16), (16, 16))
    first, second = (one.spec for one in pipeline_graphs(pipeline, "none")[1:3])
    assert [first.name, second.name] == ["text_encoder", "text_encoder_2"]
    for graph in (first, second):
        shapes = profile(graph, target, spec, 16)
        assert shapes["token_ids"] == ((1, 16), (2, 16), (2, 16))


def test_wider_engines_serve_a_narrower_request(compiled):
    narrow = Target(describe_library(RTX), ("8.9",), (2, 2), 3, (64, 64), (96, 96))
    request = Request(find_checkpoint(), "up2", "fp16", RTX, narrow)
    assert find_covering_engines(request, compiled.parent) == compiled
    assert find_engines(request, compiled.parent) is None  # who asks for narrow ones gets them
    for changes in (
        {"rows": (2, 8)},
        {"decode_calls": 11},
        {"height": (72, 72)},
        {"compute_capabilities": ("8.6",)},
        {"library": "tensorrt-rtx 1.0"},
    ):
        other = replace(request, target=replace(narrow, **changes))
        assert find_covering_engines(other, compiled.parent) is None
    assert find_covering_engines(replace(request, cut="mid"), compiled.parent) is None


def test_scratch_memory_follows_the_largest_sizes(fp16_folder):
    graph, spec = graphs_of("up2")[0][1], graphs_of("up2")[1]
    small, large = (
        Compiler(RTX, fp16_folder / graph.spec.name / ONNX).compile(
            profile(
                graph.spec, Target("any", ("8.9",), (2, 2), calls, (16, 16), (16, 16)), spec, 16
            ),
            ["8.9"],
        )
        for calls in (1, 16)
    )
    assert small.scratch_bytes < large.scratch_bytes


def test_autoencoder_tiny_compiles(tmp_path):
    pipeline = make_pipeline()
    pipeline.vae = tiny_autoencoder()
    spec = ImageSpec.of(pipeline.unet.config, pipeline.vae.config)
    graph = pipeline_graphs(pipeline.to(torch.float16), "none")[-1]
    sizes = {"B": 1, "h": 16, "w": 16}
    target = Target("any", ("8.9",), (2, 2), None, (16, 16), (16, 16))
    compiler = Compiler(RTX, write_onnx(graph, tmp_path, sizes))
    assert compiler.compile(profile(graph.spec, target, spec, 16), ["8.9"]).scratch_bytes > 0


@pytest.mark.filterwarnings("ignore:.*Timing cache")  # TensorRT-RTX takes one, to no effect
def test_a_timing_cache_is_written(fp16_folder, tmp_path):
    graph, spec = graphs_of("up2")[0][2], graphs_of("up2")[1]
    shapes = profile(graph.spec, Target("any", ("8.9",), (2, 2), 1, (16, 16), (16, 16)), spec, 16)
    path, sizes = tmp_path / "cache.timing", []
    for _ in range(2):
        Compiler(RTX, fp16_folder / graph.spec.name / ONNX).compile(shapes, ["8.9"], path)
        sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1] > 0
    assert list(tmp_path.iterdir()) == [path]


@NO_GPU
def test_without_a_gpu_engines_are_refused_in_one_sentence(compiled):
    with pytest.raises(EngineError, match=r"no NVIDIA GPU and driver here.*--gpu rtx-4090"):
        EncachePipeline.from_engines(compiled)
    result = CliRunner().invoke(main, ["--backend", RTX])
    assert result.exit_code == 1
    assert "--gpu rtx-4090" in result.stderr


def test_another_gpu_or_version_is_refused(compiled, monkeypatch):
    identity = read_manifest(compiled).identity
    monkeypatch.setattr(trt, "local_compute_capability", lambda: "8.6")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA RTX A6000")
    with pytest.raises(EngineError, match=r"for compute capability 8.9, 12.0; .* A6000, 8.6"):
        trt.refuse_elsewhere(compiled, identity)
    older = replace(identity, target=replace(identity.target, library="tensorrt-rtx 1.0"))
    with pytest.raises(EngineError, match=r"by tensorrt-rtx 1.0, .*encache-export --backend"):
        trt.refuse_elsewhere(compiled, older)
    with pytest.raises(EngineError, match="does not say"):
        trt.refuse_elsewhere(compiled, replace(identity, target=None))


def test_a_gpu_that_is_not_compiled_for_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(target, "local_compute_capability", lambda: "9.0")
    options = ["--prompt", "x", "--backend", RTX, "--engine-dir", str(tmp_path)]
    for command, arguments in ((main, options[2:]), (run, options), (bench, options[2:])):
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 1, result.output
        assert "not for 9.0. Try --backend tensorrt" in result.stderr
    assert not list(tmp_path.iterdir())


def test_tensors_that_tensorrt_cannot_read_are_copied():
    plain = torch.randn(2, 4, 8, 8)
    crooked = [plain[:, :, 1:], plain.to(memory_format=torch.channels_last), plain.flatten()[1:]]
    for tensor in crooked:
        ours = trt.aligned(tensor)
        assert ours is not tensor
        assert ours.is_contiguous()
        assert ours.data_ptr() % 64 == 0  # as far as the CPU's allocator goes
        torch.testing.assert_close(ours, tensor, rtol=0, atol=0)


def test_an_altered_engine_is_refused(compiled, tmp_path):
    folder = shutil.copytree(compiled, tmp_path / "copied")
    manifest, name = read_manifest(folder), f"unet_encoder/{ENGINE}"
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(EngineError, match="sha256 differs"):
        read_verified(folder, manifest, name)
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(EngineError, match="not what was built"):
        read_manifest(folder)


def test_a_missing_library_names_its_extra(monkeypatch):
    load_library.cache_clear()
    for module in library._LIBRARIES[RTX][0]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EngineError, match=r'pip install "encache\[rtx\]"'):
        load_library(RTX)
    load_library.cache_clear()


def test_a_graph_that_the_library_does_not_know(tmp_path):
    node = onnx.helper.make_node("Abacus", ["x"], ["y"], domain="nowhere")
    values = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    imports = [onnx.helper.make_opsetid("nowhere", 1), onnx.helper.make_opsetid("", 23)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports), tmp_path / ONNX)
    with pytest.raises(EngineError, match=r"cannot read .*Abacus"):
        Compiler(RTX, tmp_path / ONNX)


def test_gpus_by_name_and_number():
    assert resolve_compute_capabilities(RTX, ["rtx-5090", "rtx-4090"], ["7.5"]) == (
        "7.5",
        "8.9",
        "12.0",
    )
    with pytest.raises(EngineError, match=r"not for 9.0.*--backend tensorrt"):
        resolve_compute_capabilities(RTX, [], ["9.0"])
    with pytest.raises(EngineError, match="no other can be named"):
        resolve_compute_capabilities("tensorrt", ["rtx-4090"], [])


@pytest.mark.parametrize("text", ["", "0", "512:", "768:512", "1:2:3", "a", "-8", "5.5"])
def test_spans_that_are_none(text):
    with pytest.raises(ValueError, match="neither a number"):
        parse_span(text)


def test_spans():
    assert parse_span("512") == (512, 512)
    assert parse_span("512:768") == (512, 768)


def test_mistakes(tmp_path):
    compile_ = ["--backend", RTX, "--gpu", "rtx-4090", "--engine-dir", str(tmp_path)]
    for arguments, code, word in [
        ([*compile_, "--height", "100"], 1, "try 96"),
        ([*compile_, "--batch", "4:1"], 2, "neither a number"),
        (["--gpu", "rtx-4090"], 2, "--gpu means nothing without TensorRT"),
        (["--batch", "2"], 2, "--batch means nothing"),
    ]:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == code, result.output
        assert word in result.stderr
    assert not list(tmp_path.iterdir())
