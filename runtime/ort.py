"""The ONNX Runtime backend: every tensor stays where torch put it, nothing is copied."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from encache.errors import EngineError
from encache.export.manifest import ONNX, ONNX_WEIGHTS, REBUILD, Manifest, read_verified
from encache.export.target import Target
from encache.model.split import blend
from encache.runtime.engines import TORCH_DTYPES

_NUMPY = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int64,
}


class OrtEngines:
    """The graphs of an engine folder as ONNX Runtime sessions."""

    name = "onnxruntime"
    target: Target | None = None

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.identity: Mapping[str, Any] = {
            "key": manifest.identity.key,
            **asdict(manifest.identity),
        }
        self.features = manifest.features
        self.spec = manifest.spec
        self.dtype = TORCH_DTYPES[manifest.identity.dtype]
        self.device = torch.device("cpu")
        self._names = [feature.name for feature in self.features]
        self._encoder = _open_session(folder, manifest, "unet_encoder")
        self._decoder = None  # the cut "out" leaves nothing to run
        if manifest.identity.cut != "out":
            self._decoder = _open_session(folder, manifest, "unet_decoder")
        self._text_encoder = _open_session(folder, manifest, "text_encoder")
        self._vae_decoder = _open_session(folder, manifest, "vae_decoder")

    def encode(
        self, latents: Tensor, timestep: Tensor, text: Tensor, ring: Sequence[Tensor], slot: int
    ) -> None:
        inputs = {"latents": latents, "timestep": timestep, "text": text}
        outputs = {name: tensor[slot] for name, tensor in zip(self._names, ring, strict=True)}
        _run(self._encoder, inputs, outputs)

    def decode(
        self, ring: Sequence[Tensor], weights: Tensor, timesteps: Tensor, text: Tensor
    ) -> Tensor:
        if self._decoder is None:
            return blend(weights, ring[0])
        features = dict(zip(self._names, ring, strict=True))
        rows = len(weights) * len(text)
        noise = torch.empty(rows, self.spec.channels, *ring[0].shape[-2:], dtype=self.dtype)
        inputs = {**features, "weights": weights, "timesteps": timesteps, "text": text}
        _run(self._decoder, inputs, {"noise": noise})
        return noise

    def encode_text(self, token_ids: Tensor) -> Tensor:
        return _run_allocating(self._text_encoder, {"token_ids": token_ids})

    def decode_latents(self, latents: Tensor) -> Tensor:
        return _run_allocating(self._vae_decoder, {"latents": latents.to(self.dtype)})


def _open_session(folder: Path, manifest: Manifest, graph: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # Threads spin within a run, which is fastest, and stop after it: torch and the other sessions
    # need the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = read_verified(folder, manifest, f"{graph}/{ONNX}")
    weights = read_verified(folder, manifest, f"{graph}/{ONNX_WEIGHTS}")
    options.add_external_initializers_from_files_in_memory(
        [ONNX_WEIGHTS], [weights], [len(weights)]
    )
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises its own untyped exceptions
        raise EngineError(
            f"ONNX Runtime cannot open {folder / graph}: {error}. {REBUILD}"
        ) from error


def _run(
    session: onnxruntime.InferenceSession, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> None:
    binding = session.io_binding()
    kept = {name: tensor.contiguous() for name, tensor in inputs.items()}
    for name, tensor in kept.items():
        binding.bind_input(
            name, "cpu", 0, _NUMPY[tensor.dtype], list(tensor.shape), tensor.data_ptr()
        )
    for name, tensor in outputs.items():
        binding.bind_output(
            name, "cpu", 0, _NUMPY[tensor.dtype], list(tensor.shape), tensor.data_ptr()
        )
    session.run_with_iobinding(binding)


def _run_allocating(session: onnxruntime.InferenceSession, inputs: dict[str, Tensor]) -> Tensor:
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    (output,) = session.run(None, feed)
    return torch.from_numpy(output)
