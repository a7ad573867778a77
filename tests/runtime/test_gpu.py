"""What only a GPU can show; each test says which one it waits for."""

import pytest
import torch

from encache.export.build import Request, build_engines
from encache.export.library import describe_library
from encache.export.target import GPUS, Target, local_compute_capability
from encache.model.checkpoint import find_checkpoint
from encache.runtime.pipeline import EncachePipeline
from encache.runtime.replay import Replay

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
CALL = {"num_inference_steps": 6, "stride": 2, "output_type": "latent"}


def draw(pipe, seed=0, **changes):
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return pipe("red apple", latents=noise, **{**CALL, **changes}).images.cpu()


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


@GPU
@pytest.mark.parametrize("cut", ["mid", "up2", "out"])
def test_captured_sampling_equals_the_cpu(pipeline, cut):
    expected = [draw(EncachePipeline.from_pipe(pipeline, cut), seed) for seed in range(3)]
    pipe = EncachePipeline.from_pipe(pipeline.to("cuda"), cut)
    # The first run warms up, the second captures, the third replays.
    for seed, one in enumerate(expected):
        torch.testing.assert_close(draw(pipe, seed), one, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(  # another plan must not run the old graph
        draw(pipe, 0, stride=3),
        draw(EncachePipeline.from_pipe(pipeline.to("cpu"), cut), 0, stride=3),
        rtol=1e-3,
        atol=1e-3,
    )


@GPU
@pytest.mark.parametrize("cut", ["up2", "out"])
def test_tensorrt_rtx_equals_the_cpu(model_folder, pipeline, tmp_path, cut):
    pytest.importorskip("tensorrt_rtx_bindings", reason="needs encache[rtx]")
    here = local_compute_capability()
    if here not in GPUS.values():
        pytest.skip(f"TensorRT-RTX does not compile for compute capability {here}")
    library = describe_library("tensorrt-rtx")
    target = Target(library, (here,), (2, 2), 0 if cut == "out" else 2, (16, 16), (16, 16))
    request = Request(find_checkpoint(model_folder), cut, "fp16", "tensorrt-rtx", target)
    pipe = EncachePipeline.from_engines(build_engines(request, tmp_path))
    for seed in range(3):
        expected = draw(EncachePipeline.from_pipe(pipeline, cut), seed)
        assert (draw(pipe, seed) - expected).norm() / expected.norm() < 0.05
