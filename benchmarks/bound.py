"""How fast can Stable Diffusion v1.5 be on a GPU, by its arithmetic and its bytes alone?

    python benchmarks/bound.py                     # an RTX 4090; prints the tables of docs
    python benchmarks/bound.py --calls 4 --rows 1 --stride 4    # one encoder run, no guidance

Every part is counted on shapes alone, at 512x512, one picture, by default with guidance (two rows
of the UNet), and fp16 weights. A run of a part takes at least its arithmetic over the GPU's peak,
and at least its weights and features over the memory's bandwidth; activations inside a part are
left out. What an engine really takes is more: the share of the peak that it reaches is measured by
encache-bench.
"""

import argparse
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from encache.evaluate.random_weights import CLIP_L, SHAPES, VAE
from encache.model.arithmetic import count_arithmetic
from encache.model.backbone import backbone_of
from encache.model.spec import CUTS, NO_CUT, Cut
from encache.model.split import Halves

LATENT = 64
STRIDES = (1, 3, 5, 10, 20)
BYTES = 2  # fp16
SLOTS = 2  # of the ring, which the default blend reads


def num_bytes(*modules: torch.nn.Module) -> int:
    """Of the modules' weights."""
    return BYTES * sum(one.numel() for module in modules for one in module.parameters())


def gflop(function: Callable, *inputs: torch.Tensor) -> float:
    """Of one run, on shapes alone."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops() / 1e9


def unet_parts(cut: Cut, rows: int) -> dict[str, tuple[float, int]]:
    """GFLOP per row and bytes per run of the encoder and the decoder.

    Bytes are weights, and the features that the encoder writes and the decoder reads, from two
    slots of the ring.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHAPES["sd15"].unet)
    arithmetic = count_arithmetic(unet, cut, LATENT, LATENT)
    if cut == NO_CUT:
        return {"encoder": (arithmetic.full, num_bytes(unet)), "decoder": (0.0, 0)}
    sizes = {"B": rows, "h": LATENT, "w": LATENT}
    shapes = [one.size(sizes) for one in Halves(unet, cut).features]
    features = BYTES * sum(torch.Size(shape).numel() for shape in shapes)
    stages = backbone_of(unet).stages_before(cut)
    early = num_bytes(*(unet.get_submodule(path) for path in stages))
    return {
        "encoder": (arithmetic.encoder, early + num_bytes(unet.time_embedding) + features),
        "decoder": (arithmetic.decoder, num_bytes(unet) - early + SLOTS * features),
    }


def other_parts(small: bool, rows: int) -> dict[str, tuple[float, int]]:
    """GFLOP and bytes of encoding the prompt, with guidance its negative too, and of decoding.

    With a small decoder, by AutoencoderTiny.
    """
    with torch.device("meta"):
        text_encoder = CLIPTextModel(CLIPTextConfig(**CLIP_L))
        vae = AutoencoderTiny() if small else AutoencoderKL(**VAE)
        tokens = torch.zeros(rows, 77, dtype=torch.int64)
        latents = torch.empty(1, 4, LATENT, LATENT)

    return {
        # Of the table of tokens, a prompt reads a few rows.
        "text encoder": (
            gflop(text_encoder, tokens),
            num_bytes(text_encoder) - num_bytes(text_encoder.get_input_embeddings()),
        ),
        "image decoder": (gflop(vae.decode, latents), num_bytes(vae.decoder)),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tflops", type=float, default=165.2, help="peak of the GPU (RTX 4090)")
    parser.add_argument("--bandwidth", type=float, default=1008, help="GB/s (RTX 4090)")
    parser.add_argument("--reached", type=float, default=1.0, help="share of the peak reached")
    parser.add_argument("--tiny-vae", action="store_true", help="decode by AutoencoderTiny")
    parser.add_argument("--calls", type=int, default=50, help="of the sampler")
    parser.add_argument("--rows", type=int, default=2, help="2 with guidance, 1 without")
    parser.add_argument("--stride", type=int, nargs="+", default=STRIDES, help="of key calls")
    options = parser.parse_args()
    rows, num_calls = options.rows, options.calls

    def milliseconds(gflop: float, size: float) -> float:
        arithmetic = gflop / options.tflops / options.reached
        return max(arithmetic, size / options.bandwidth / 1e6)

    others = other_parts(options.tiny_vae, rows)
    cuts = {cut: unet_parts(cut, rows) for cut in CUTS}
    print("| part | GFLOP | MB | ms |\n|---|---|---|---|")
    for name, (cost, size) in others.items():
        print(f"| {name} | {cost:.0f} | {size / 1e6:.0f} | {milliseconds(cost, size):.2f} |")
    for cut, parts in cuts.items():
        for name, (cost, size) in parts.items():
            cost *= rows
            cells = f"{cost:.0f} | {size / 1e6:.0f} | {milliseconds(cost, size):.2f}"
            print(f"| UNet {name}, cut {cut} | {cells} |")
    fixed = sum(milliseconds(*part) for part in others.values())
    print(f"\n| cut | {' | '.join(f'stride {n}' for n in options.stride)} |")
    print("|---" * (len(options.stride) + 1) + "|")
    for cut, parts in cuts.items():
        cells = []
        for stride in options.stride:
            keys = -(-num_calls // stride)
            encoder, decoder = parts["encoder"], parts["decoder"]
            total = fixed + keys * milliseconds(rows * encoder[0], encoder[1])
            # One run decodes a segment: its arithmetic is that of all its calls, its bytes of one.
            runs = [min(stride, num_calls - key * stride) for key in range(keys)]
            total += sum(milliseconds(rows * decoder[0] * n, decoder[1]) for n in runs)
            cells.append(f"{total:.0f} ms")
        print(f"| {cut} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
