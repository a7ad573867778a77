"""OpenVINO beside ONNX Runtime: the same pictures, in fp32 and in bf16."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from encache.contract.manifest import (
    MANIFEST,
    ONNX,
    ONNX_WEIGHTS,
    read_manifest,
    record_files,
)
from encache.errors import EncacheError, EngineError
from encache.export.build import Request
from encache.export.cli import main
from encache.model.checkpoint import find_checkpoint
from encache.model.spec import GraphSpec, TensorSpec
from encache.runtime.openvino import load_openvino, open_openvino, refuse_without_bf16
from encache.runtime.pipeline import EncachePipeline

BF16 = pytest.mark.skipif(
    "BF16" not in load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="the CPU has no bf16",
)
#: Largest relative error of latents after four calls. bf16 has 8 bits of precision.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def reopened(folder, place, dtype):
    """The graphs of an ONNX Runtime folder as OpenVINO's."""
    copied = shutil.copytree(folder, place / dtype)
    manifest = read_manifest(copied)
    identity = replace(manifest.identity, backend="openvino", dtype=dtype)
    replace(manifest, identity=identity).write(copied)
    return copied


def draw(pipe, **changes):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {"latents": noise, "num_inference_steps": 4, "stride": 2, "output_type": "latent"}
    call |= {"height": 32, "width": 32}
    pipe.set_progress_bar_config(disable=True)
    return pipe("red apple", **{**call, **changes}).images


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_weights_of_a_real_size(tmp_path):
    """OpenVINO reads those of a megabyte and more only when it compiles, for each set of shapes."""
    width = 640
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "layer"
    folder.mkdir()
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", width]) for name in ("x", "y")
    )
    nodes = [helper.make_node("MatMul", ["x", "matrix"], ["y"])]
    weights = [numpy_helper.from_array(matrix.numpy(), "matrix")]
    graph = helper.make_graph(nodes, "layer", [x], [y], weights)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(
        helper.make_model(graph, opset_imports=opset, ir_version=10),
        folder / ONNX,
        save_as_external_data=True,
        location=ONNX_WEIGHTS,
        size_threshold=0,
    )
    specs = [(TensorSpec(name, ("B", width), "float32"),) for name in ("x", "y")]
    manifest = SimpleNamespace(
        identity=SimpleNamespace(dtype="fp32"),
        graphs=[GraphSpec("layer", *specs)],
        files=record_files(tmp_path),
    )
    layer = open_openvino(tmp_path, manifest)["layer"]
    for batch in (1, 3):
        given, found = torch.ones(batch, width), torch.empty(batch, width)
        layer.run({"x": given}, {"y": found})
        torch.testing.assert_close(found, given @ matrix, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=BF16)])
@pytest.mark.parametrize("cut", ["none", "up2"])
def test_it_draws_what_onnx_runtime_draws(engine_folder, up2_folder, tmp_path, dtype, cut):
    folder = engine_folder if cut == "none" else up2_folder
    reference = EncachePipeline.from_engines(folder)
    pipe = EncachePipeline.from_engines(reopened(folder, tmp_path, dtype))
    assert pipe.engines.name == "openvino"
    assert pipe.engines.dtype == torch.float32
    apart = error(draw(pipe), draw(reference))
    assert apart < TOLERANCE[dtype]
    if dtype == "bf16":  # else the hint was ignored
        assert apart > 1e-4
    # Two pictures of another size, on the same graphs.
    wide = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(1))
    sizes = {"latents": wide, "num_images_per_prompt": 2, "height": 24, "width": 40}
    assert error(draw(pipe, **sizes), draw(reference, **sizes)) < TOLERANCE[dtype]


def test_it_is_compiled_once_for_each_of_few_sets_of_shapes(engine_folder, tmp_path):
    pipe = EncachePipeline.from_engines(reopened(engine_folder, tmp_path, "fp32"))
    reference = EncachePipeline.from_engines(engine_folder)
    text = torch.randn(1, 16, pipe.engines.conditions[0].shape[-1])

    def widths_after(*widths):
        for width in widths:
            inputs = torch.randn(1, 4, 12, width), torch.tensor([500.0]), {"text": text}
            expected = reference.engines.denoise(*inputs)
            torch.testing.assert_close(pipe.engines.denoise(*inputs), expected, rtol=0, atol=1e-4)
        return {dict(shapes)["latents"][-1]: one for shapes, one in graph._requests.items()}

    graph = pipe.engines._graphs["unet"]
    first = widths_after(10, 11, 12, 13)
    assert widths_after(11, 10, 13, 12) == first
    later = widths_after(14)
    assert [*later] == [10, 13, 12, 14]
    assert all(later[width] is first[width] for width in (10, 12, 13))


@pytest.mark.parametrize("cut", ["none", "up2"])
def test_latents_that_it_computes_wrongly_are_refused(engine_folder, up2_folder, tmp_path, cut):
    folder = engine_folder if cut == "none" else up2_folder
    pipe = EncachePipeline.from_engines(reopened(folder, tmp_path, "fp32"))
    with pytest.raises(EngineError, match=r"8x8 pixels and less wrongly: .*onnxruntime"):
        draw(pipe, latents=torch.zeros(1, 4, 8, 8), height=16, width=16)


def test_threads_take_turns(engine_folder, tmp_path):
    pipe = EncachePipeline.from_engines(reopened(engine_folder, tmp_path, "fp32"))
    alone = draw(pipe)
    with ThreadPoolExecutor(3) as threads:
        for one in threads.map(lambda _: draw(pipe), range(6)):
            torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-5)


def test_an_altered_graph_is_refused(engine_folder, tmp_path):
    folder = reopened(engine_folder, tmp_path, "fp32")
    path = folder / "unet" / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EngineError, match="sha256 differs"):
        EncachePipeline.from_engines(folder)


def test_a_cpu_without_bf16_is_refused_in_one_sentence():
    refuse_without_bf16(["FP32", "BF16", "INT8"])
    with pytest.raises(EngineError, match=r"no instructions for bf16 .*--dtype fp32"):
        refuse_without_bf16(["FP32", "INT8"])


def test_a_missing_library_names_its_extra(engine_folder, tmp_path, monkeypatch):
    folder = reopened(engine_folder, tmp_path, "fp32")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r'pip install "encache\[openvino\]"'):
        EncachePipeline.from_engines(folder)


def test_nobody_is_told_that_it_was_imported():
    code = "import sys; from encache.runtime.openvino import load_openvino; load_openvino().Core()"
    code += "; print([name for name, one in sys.modules.items() if one and 'telemetry' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'openvino_telemetry" not in done.stdout
    assert "openvino" in done.stdout


def test_it_is_exported_in_bf16(model_folder, tmp_path, only_text_encoder):
    options = ["--ckpt", str(model_folder), "--backend", "openvino", "--engine-dir", str(tmp_path)]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    (folder,) = (path.parent for path in tmp_path.glob(f"*/{MANIFEST}"))
    identity = read_manifest(folder).identity
    assert (identity.backend, identity.dtype, identity.target) == ("openvino", "bf16", None)
    with pytest.raises(EncacheError, match="openvino takes --dtype fp32 or bf16, not fp16"):
        Request(find_checkpoint(model_folder), "none", "fp16", "openvino")
