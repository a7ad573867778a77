"""What only a GPU can show; each test says which one it waits for."""

import onnxruntime
import pytest
import torch

from encache.contract.target import GPUS, local_compute_capability, make_target
from encache.errors import EngineError
from encache.export.build import Request, build_engines
from encache.model.checkpoint import find_checkpoint
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.replay import Replay

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
#: Segments of 2, 2 and 1 calls, or of one key call and the call between: shapes alternate.
CALL = {"num_inference_steps": 5, "stride": 2, "output_type": "latent"}
BLENDS = ("extrapolate", "interpolate")


def draw(pipe, seed=0, **changes):
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return pipe("red apple", latents=noise, **{**CALL, **changes}).images.cpu()


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture
def exact(monkeypatch):
    """fp32 as on the CPU, without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def test_what_cannot_be_captured_still_runs(monkeypatch, caplog):
    def refuse():
        raise RuntimeError("no graph today")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    replay = Replay(lambda x: 2 * x)
    for seed in range(3):
        x = torch.full((2,), float(seed))
        torch.testing.assert_close(replay(x), 2 * x)
    assert not replay.captured
    assert caplog.text.count("no graph today") == 1


@GPU
@pytest.mark.parametrize("failure", [RuntimeError, EngineError])
def test_a_failed_capture_leaves_all_as_it_was(failure):
    def function(x):
        if torch.cuda.is_current_stream_capturing():
            if failure is EngineError:
                raise EngineError("refused")
            x.sum().item()  # a synchronisation, which invalidates the capture
        return 2 * x

    replay, before = Replay(function), torch.cuda.current_stream()
    for seed in range(3):
        x = torch.full((2,), float(seed), device="cuda")
        torch.testing.assert_close(replay(x), 2 * x)
        assert torch.cuda.current_stream() == before
    assert not replay.captured
    assert torch.randn(2, device="cuda").isfinite().all()  # which a broken capture forbids
    other = Replay(lambda x: 3 * x)
    for seed in range(3):
        x = torch.full((2,), float(seed), device="cuda")
        torch.testing.assert_close(other(x), 3 * x)
    assert other.captured


@GPU
def test_a_replay_computes_what_the_function_does():
    weight, buffer = torch.randn(8, 8, device="cuda"), torch.zeros(8, device="cuda")

    def function(x, y):
        buffer.copy_(weight @ x)
        return buffer + y

    replay = Replay(function)
    for seed in range(4):
        x, y = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed)).cuda()
        torch.testing.assert_close(replay(x, y), weight @ x + y)
    assert replay.captured


@GPU
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("cut", ["mid", "up2", "none"])
def test_captured_sampling_equals_eager_and_the_cpu(pipeline, cut, blend):
    cpu = EncachePipeline.from_pipe(pipeline, cut)
    expected = [draw(cpu, seed, blend=blend) for seed in range(4)]
    pipeline.to("cuda")
    eager = EncachePipeline.from_pipe(pipeline, cut)
    captured = EncachePipeline.from_pipe(pipeline, cut, capturable=True)
    # The first run warms up, the second captures, the others replay.
    for seed, one in enumerate(expected):
        ours = draw(captured, seed, blend=blend)
        assert error(ours, draw(eager, seed, blend=blend)) < 1e-5
        assert error(ours, one) < 1e-3
    assert captured._executor._kept[1][1].captured
    for seed in range(3):  # another plan must not run the old graph, and has one of its own
        changed = draw(captured, seed, stride=3, blend=blend)
        assert error(changed, draw(eager, seed, stride=3, blend=blend)) < 1e-5
    assert captured._executor._kept[1][1].captured


@GPU
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("cut", ["up2", "none"])
def test_tensorrt_rtx_follows_the_cpu(model_folder, pipeline, tmp_path, cut):
    """As near as fp16 is; the tiny model's random weights make much of its rounding."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs encache[rtx]")
    if (here := local_compute_capability()) not in GPUS.values():
        pytest.skip(f"TensorRT-RTX does not compile for compute capability {here}")
    checkpoint = find_checkpoint(model_folder)
    target = make_target(checkpoint, "tensorrt-rtx", cut, decode_calls=2)
    request = Request(checkpoint, cut, "fp16", "tensorrt-rtx", target)
    pipe = EncachePipeline.from_engines(build_engines(request, tmp_path))
    cpu = EncachePipeline.from_pipe(pipeline, cut)
    for blend in BLENDS:
        drawn = [draw(pipe, seed, blend=blend) for seed in range(4)]
        for seed, one in enumerate(drawn):  # as it is, captured, and replayed
            assert error(one, draw(cpu, seed, blend=blend)) < 0.05
        assert pipe._executor._kept[1][1].captured
        torch.testing.assert_close(draw(pipe, blend=blend), drawn[0])
    pictures = [draw(one, output_type="pt") for one in (pipe, cpu)]
    assert error(*pictures) < 0.05


@GPU
@pytest.mark.usefixtures("exact")
def test_onnxruntime_on_a_gpu_follows_the_cpu(pipeline, up2_folder):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    gpu, cpu = EncachePipeline.from_engines(up2_folder), EncachePipeline.from_pipe(pipeline, "up2")
    for seed in range(3):
        assert error(draw(gpu, seed), draw(cpu, seed)) < 1e-2  # its attention uses TF32
