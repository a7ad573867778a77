"""The default model's autoencoder: 64x64 pictures <-> 16x16x4 latents."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from encache.train.loop import Losses, Recipe, digest, fit, step_generators

RECIPE = Recipe(steps=3000, learning_rate=2e-3, weight_decay=1e-4, ema_decay=0.995)
BATCH_SIZE = 16
#: Weight of the mean KL per latent element: enough noise that the decoder forgives small errors.
KL_WEIGHT = 1e-3


def make_autoencoder() -> AutoencoderKL:
    """Build an untrained AutoencoderKL that halves the picture twice."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )


class Reconstruct(nn.Module):
    """Picture -> noisy latents -> picture, as one forward pass."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return images [B, 3, H, W] again, and the mean KL per latent element.

        `noise` [B, 4, H/4, W/4] picks the latents from their posterior.
        """
        posterior = self.autoencoder.encode(images).latent_dist
        decoded = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        return decoded, posterior.kl().mean() / posterior.mean[0].numel()


def train_autoencoder(
    images: Tensor, checkpoint: Path, recipe: Recipe = RECIPE, seed: int = 0
) -> AutoencoderKL:
    """Fit the autoencoder to images [N, 3, 64, 64] in [-1, 1]; its latents are standardised."""
    torch.manual_seed(seed)
    autoencoder = make_autoencoder().to(memory_format=torch.channels_last)
    noise_shape = (BATCH_SIZE, 4, images.shape[2] // 4, images.shape[3] // 4)

    def compute_losses(model: nn.Module, generator: torch.Generator) -> Losses:
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        noise = torch.randn(noise_shape, generator=generator).to(autoencoder.device)
        batch = images[chosen].to(autoencoder.device, memory_format=torch.channels_last)
        decoded, kl = model(batch, noise)
        error = decoded - batch
        return Losses({"l1": error.abs().mean(), "l2": error.square().mean(), "kl": KL_WEIGHT * kl})

    identity = {"images": digest(images), "seed": seed}
    fit(
        Reconstruct(autoencoder),
        step_generators(seed),
        compute_losses,
        recipe,
        checkpoint,
        identity=identity,
    )
    autoencoder.cpu()
    standardise(autoencoder, encode(autoencoder, images))
    return autoencoder


@torch.no_grad()
def standardise(autoencoder: AutoencoderKL, latents: Tensor) -> None:
    """Give every latent channel zero mean and unit variance over `latents` [N, 4, h, w].

    One scaling factor cannot do this, and diffusers' Stable Diffusion applies no other, so the
    shift and scale move into the 1x1 convolutions on both sides; pictures stay the same.
    """
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    into, out_of = autoencoder.quant_conv, autoencoder.post_quant_conv
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.bias[4:] -= 2 * std.log()  # the other half of the channels is the log variance
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight *= std[None, :, None, None]
    autoencoder.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Latent means of images [N, 3, H, W], unscaled, as [N, 4, H/4, W/4]."""
    batches = images.split(64)
    return torch.cat([autoencoder.encode(batch).latent_dist.mean for batch in batches])
