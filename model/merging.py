"""Token merging (ToMe, arXiv 2303.17604), in operations that ONNX and TensorRT know.

Before self-attention, tokens that resemble another one are averaged with it; behind it, each of
them takes what came out for their mean. The top left token of every two by two is a target, and all
others are candidates to be merged into the target that they resemble most. This is what the tomesd
package does without its random choice, with other means: it averages by a scatter that adds up, and
the exporter writes one that overwrites, without a warning. Here an average is a product with a
one-hot matrix, and the way back is a gather.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from diffusers import Transformer2DModel
from torch import Tensor

from encache.errors import CheckpointError
from encache.model.copies import ChildStandIn, with_children


@dataclass(frozen=True)
class Matching:
    """Which of N tokens share one of n slots: first those that stay alone, then the targets.

    Attributes:
        alone: numbers of the tokens that stay alone [B, K].
        mean: the weights by which each target's slot is a mean of tokens [B, T, N].
        slots: of each token [B, N].
    """

    alone: Tensor
    mean: Tensor
    slots: Tensor

    def merge(self, tokens: Tensor) -> Tensor:
        """The slots' tokens [B, K + T, C] of all tokens [B, N, C]."""
        return torch.cat([_take(tokens, self.alone), self.mean.to(tokens.dtype) @ tokens], 1)

    def unmerge(self, merged: Tensor) -> Tensor:
        """For each token [B, N, C] what its slot [B, K + T, C] holds."""
        return _take(merged, self.slots)


def match(tokens: Tensor, size: tuple[int, int], ratio: Fraction) -> Matching:
    """Find the `ratio` of all tokens that resemble a target most.

    Args:
        tokens: of a grid, row by row [B, h * w, C].
        size: height h and width w of the grid.
        ratio: between 0 and 3/4, so that there are always enough that are no targets.

    Raises:
        CheckpointError: the grid is so small that it holds no target.
    """
    height, width = size
    if height < 2 or width < 2:
        raise CheckpointError(
            f"ToMe merges tokens within two by two latents, and here are {height} by {width}: "
            "draw a larger picture, or leave out --tome."
        )
    row, column = (torch.arange(one, device=tokens.device) for one in (height, width))
    rows, columns = height // 2, width // 2
    # A last odd row or column holds no targets.
    target_row, target_column = (
        (one % 2 == 0) & (one // 2 < most) for one, most in ((row, rows), (column, columns))
    )
    is_target = (target_row[:, None] & target_column).flatten()
    places = (row[: 2 * rows : 2, None] * width + column[: 2 * columns : 2]).flatten()
    # Half precision cannot hold the squares of large values, nor tell near neighbours apart.
    directions = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    directions = directions / directions.norm(dim=-1, keepdim=True)
    likeness, nearest = (directions @ directions[:, places].transpose(1, 2)).max(-1)
    own = (row[:, None] // 2 * columns + column // 2).flatten()
    nearest = torch.where(is_target, own, nearest)
    # Exact, where a product of floats may come out one token short, as 100 * 0.29 does.
    merged = height * width * ratio.numerator // ratio.denominator
    num_alone = height * width - rows * columns - merged
    # No two tokens are more alike than 1.
    alone = likeness.masked_fill(is_target, 2).topk(num_alone, largest=False).indices
    order = torch.arange(1, num_alone + 1, device=tokens.device).expand_as(alone)
    place = torch.zeros_like(nearest).scatter(1, alone, order)  # no two in one place
    target = torch.arange(rows * columns, device=tokens.device)
    chosen = (target[:, None] == nearest[:, None]) & (place == 0)[:, None]
    mean = chosen / chosen.sum(-1, keepdim=True)
    return Matching(alone, mean, torch.where(place > 0, place - 1, num_alone + nearest))


def _take(tokens: Tensor, numbers: Tensor) -> Tensor:
    """The tokens [B, n, C] of these numbers [B, n]."""
    return tokens.gather(1, numbers[:, :, None].expand(-1, -1, tokens.shape[-1]))


class MergingTransformer(Transformer2DModel):
    """A transformer between a UNet's convolutions whose self-attention sees merged tokens."""

    merge_ratio: Fraction

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        _, _, height, width = hidden_states.shape
        children = {
            f"transformer_blocks.{index}": ChildStandIn(
                block, partial(self._run, block, (height, width))
            )
            for index, block in enumerate(self.transformer_blocks)
        }
        copied = with_children(self, children)
        return Transformer2DModel.forward(copied, hidden_states, *arguments, **options)

    def _run(self, block: Any, size: tuple[int, int], tokens: Tensor, **options: Any) -> Any:
        """A block's own forward, with its tokens merged between norm and residual."""
        matching = match(tokens, size, self.merge_ratio)
        norm, attention = block.norm1, block.attn1
        children = {
            "norm1": ChildStandIn(norm, lambda one: matching.merge(norm(one))),
            "attn1": ChildStandIn(
                attention, lambda one, **told: matching.unmerge(attention(one, **told))
            ),
        }
        return with_children(block, children)(tokens, **options)


def merge_tokens(unet: Any, ratio: Fraction) -> int:
    """Let a UNet merge tokens where it attends at the latents' own size.

    Returns:
        How many of its transformers do.
    """
    found = [
        one
        for block in _full_size_blocks(unet)
        for one in getattr(block, "attentions", ())
        if type(one) is Transformer2DModel
    ]
    for one in found:
        one.__class__ = MergingTransformer
        one.merge_ratio = ratio
    return len(found)


def _full_size_blocks(unet: Any) -> list[Any]:
    """Up to the first block that halves the size, and from behind the last that doubles it."""
    blocks = []
    for block in unet.down_blocks:
        blocks.append(block)
        if block.downsamplers:
            break
    for block in reversed(unet.up_blocks):
        if block.upsamplers:
            break
        blocks.append(block)
    return blocks
