"""Milliseconds that arithmetic takes at least on an RTX 4090, by its precision."""

from collections.abc import Collection

from encache.export.calibrate import Observed

#: Published, without sparsity, with accumulation in fp32 or int32.
PEAK_TFLOPS = {"fp16": 165.2, "fp8": 330.3, "int8": 660.6}


def milliseconds(observed: Observed, left_out: Collection[str], dtype: str) -> float:
    """Of one run of a graph: attention in FP8, layers that are left out in fp16.

    Activations, norms and copies are not counted.
    """
    half, total = observed.flop, 0.0
    for name, layer in observed.layers.items():
        if name not in left_out:
            half -= layer.flop
            total += layer.flop / PEAK_TFLOPS["fp8" if layer.is_attention else dtype]
    return (total + half / PEAK_TFLOPS["fp16"]) / 1e9
