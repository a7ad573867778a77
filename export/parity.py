"""Does an exported graph compute what PyTorch computes?"""

from pathlib import Path

import torch
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.logger import G_LOGGER

from encache.export.graphs import Graph, flatten


def measure_parity(graph: Graph, path: Path, sample_size: int) -> float:
    """Largest ||graph - eager|| / ||eager|| over the outputs, on fresh random inputs.

    The sizes differ from those traced: odd and not square, so that a frozen dimension shows.

    Args:
        graph: its module in fp32, the reference.
        path: the exported model.onnx, run by ONNX Runtime on the CPU.
        sample_size: latent size of the model; half of it is tried.
    """
    sizes = {"B": 3, "K": 2, "M": 3, "h": sample_size // 2 + 1, "w": sample_size // 2}
    inputs = graph.draw(torch.Generator().manual_seed(1), sizes)
    with torch.inference_mode():
        eager = graph.module(*inputs)
    eager = (eager,) if isinstance(eager, torch.Tensor) else eager
    feed = dict(zip(graph.inputs, flatten(inputs), strict=True))
    with G_LOGGER.verbosity(G_LOGGER.ERROR), OnnxrtRunner(SessionFromOnnx(str(path))) as runner:
        expected = runner.get_input_metadata()
        outputs = runner.infer(
            {name: one.numpy().astype(expected[name].dtype) for name, one in feed.items()}
        )
    errors = [
        (torch.from_numpy(outputs[name]).float() - one).norm() / one.norm()
        for name, one in zip(graph.outputs, eager, strict=True)
    ]
    return torch.stack(errors).max().item()  # unlike Python's max, this keeps a NaN
