"""Token merging (ToMe, arXiv 2303.17604) as an edit of a model; see `encache.model.merging`."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from encache.errors import CheckpointError


@dataclass(frozen=True)
class TokenMerging:
    """Less self-attention, where a UNet attends at the latents' own size.

    Attributes:
        ratio: how many of all tokens are merged away.
    """

    ratio: Fraction

    @property
    def name(self) -> str:
        return f"tome{float(self.ratio):g}"

    @property
    def fingerprint(self) -> str:
        return f"tome {self.ratio}"

    def apply(self, pipeline: Any) -> None:
        """Change the pipeline's UNet.

        Raises:
            CheckpointError: it attends nowhere at that size, as Stable Diffusion XL.
        """
        from encache.model.merging import merge_tokens

        if not merge_tokens(pipeline.unet, self.ratio):
            raise CheckpointError(
                "This UNet attends nowhere at the latents' own size, where ToMe merges tokens, so "
                "it would change nothing: leave out --tome."
            )


def find_tome(ratio: float) -> TokenMerging:
    """Token merging at a ratio such as 0.5.

    Raises:
        CheckpointError: it is not between 0 and 0.75. A quarter of the tokens are those into which
            others are merged.
    """
    if not 0 < ratio < 0.75:  # so NaN is refused, too
        raise CheckpointError(
            f"ToMe merges more than 0 and less than 0.75 of the tokens, not {ratio}: try 0.5."
        )
    return TokenMerging(Fraction(str(ratio)))
