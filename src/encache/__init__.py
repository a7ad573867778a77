"""Stable Diffusion with a cached UNet encoder, deployed through ONNX and TensorRT."""

__version__ = "0.3.0"
