"""FID's own Inception network in plain tensor operations.

The package that publishes it cannot be imported without torchvision, and later Inceptions of
torchvision and timm give other numbers.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, max_pool2d, relu

State = Mapping[str, Tensor]


class Inception:
    """The Inception v3 of 2015 that defines FID, straight from its weights.

    It differs from later ones: average pools leave out the padding, the last block takes a
    maximum, pictures are 8-bit and enlarged without half-pixel centres, and there are 1008
    classes. Norms are folded into the convolutions before them.

    Its numbers: the pooled 2048 features of FID (Heusel et al., arXiv 1706.08500); probabilities
    without the classifier's bias, as the Inception score has them (Salimans et al., arXiv
    1606.03498); and the first 7 channels of the 17 x 17 maps of `mixed_6/conv`, 2023 features, for
    sFID (Nash et al., arXiv 2103.03841).
    """

    def __init__(self, state: State, device: str = "cpu") -> None:
        names = [key.removesuffix(".conv.weight") for key in state if key.endswith(".conv.weight")]
        folded = {name: _fold_norm(state, name) for name in names}
        self.convolutions = {
            name: (kernel.to(device), bias.to(device)) for name, (kernel, bias) in folded.items()
        }
        self.classifier = state["fc.weight"].float().to(device)

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, probabilities and spatial features of pictures [B, 3, H, W] in [0, 1]."""
        x = resize_as_tensorflow_1((255 * pictures).round(), 299) / 128 - 1
        x = self._convolve(x, "Conv2d_1a_3x3", stride=2)
        x = self._convolve(x, "Conv2d_2a_3x3", pad=False)
        x = self._convolve(x, "Conv2d_2b_3x3")
        x = max_pool2d(x, 3, 2)
        x = self._convolve(x, "Conv2d_3b_1x1")
        x = self._convolve(x, "Conv2d_4a_3x3", pad=False)
        x = max_pool2d(x, 3, 2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._mix(x, block, {"branch5x5": 2, "branch3x3dbl": 3})
        x = self._shrink(x, "Mixed_6a", ["branch3x3"], {"branch3x3dbl": 3})
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self._mix(x, block, {"branch7x7": 3, "branch7x7dbl": 5})
            if block == "Mixed_6d":  # TensorFlow's mixed_6, whose first branch is `conv`
                spatial = x[:, :7].flatten(1)
        x = self._shrink(x, "Mixed_7a", [], {"branch3x3": 2, "branch7x7x3": 4})
        x = self._fork(x, "Mixed_7b", _average)
        x = self._fork(x, "Mixed_7c", _maximum)
        features = adaptive_avg_pool2d(x, 1).flatten(1)
        return features, (features @ self.classifier.T).softmax(1), spatial

    def _convolve(self, x: Tensor, name: str, stride: int = 1, pad: bool = True) -> Tensor:
        """Strided convolutions have no padding; others keep the size unless told otherwise."""
        kernel, bias = self.convolutions[name]
        padding = [side // 2 for side in kernel.shape[2:]] if pad and stride == 1 else 0
        return relu(conv2d(x, kernel, bias, stride, padding))

    def _chain(self, x: Tensor, name: str, length: int, stride: int = 1) -> Tensor:
        """Convolutions name_1, name_2, ..., of which the last has the stride."""
        for index in range(1, length + 1):
            x = self._convolve(x, f"{name}_{index}", stride if index == length else 1)
        return x

    def _mix(self, x: Tensor, block: str, chains: Mapping[str, int]) -> Tensor:
        """A block that keeps the size."""
        branches = [
            self._convolve(x, f"{block}.branch1x1"),
            *(self._chain(x, f"{block}.{name}", length) for name, length in chains.items()),
            self._convolve(_average(x), f"{block}.branch_pool"),
        ]
        return torch.cat(branches, 1)

    def _shrink(
        self, x: Tensor, block: str, single: Sequence[str], chains: Mapping[str, int]
    ) -> Tensor:
        """A block that halves the size."""
        branches = [
            *(self._convolve(x, f"{block}.{name}", stride=2) for name in single),
            *(self._chain(x, f"{block}.{name}", length, 2) for name, length in chains.items()),
            max_pool2d(x, 3, 2),
        ]
        return torch.cat(branches, 1)

    def _fork(self, x: Tensor, block: str, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """A block whose chains end in a 1x3 and a 3x1 convolution side by side."""
        narrow = self._chain(x, f"{block}.branch3x3", 1)
        wide = self._chain(x, f"{block}.branch3x3dbl", 2)
        branches = [
            self._convolve(x, f"{block}.branch1x1"),
            *(self._convolve(narrow, f"{block}.branch3x3_2{side}") for side in "ab"),
            *(self._convolve(wide, f"{block}.branch3x3dbl_3{side}") for side in "ab"),
            self._convolve(pool(x), f"{block}.branch_pool"),
        ]
        return torch.cat(branches, 1)


def _average(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return max_pool2d(x, 3, 1, 1)


def _fold_norm(state: State, name: str) -> tuple[Tensor, Tensor]:
    """Kernel and bias of the convolution `name` with the batch norm that follows it."""
    mean, variance, bias, gain = (
        state[f"{name}.bn.{part}"].double()
        for part in ("running_mean", "running_var", "bias", "weight")
    )
    scale = gain / (variance + 1e-3).sqrt()
    kernel = state[f"{name}.conv.weight"].double() * scale[:, None, None, None]
    return kernel.float(), (bias - mean * scale).float()


def resize_as_tensorflow_1(pictures: Tensor, side: int) -> Tensor:
    """Scale pictures [B, C, H, W] to side x side; output i lies at i * H / side exactly."""

    def weights(size: int) -> Tensor:
        place = torch.arange(side, device=pictures.device) * (size / side)
        low = place.long()
        rows = torch.eye(size, device=pictures.device)
        return torch.lerp(rows[low], rows[(low + 1).clamp(max=size - 1)], (place - low)[:, None])

    height, width = pictures.shape[2:]
    return weights(height) @ pictures @ weights(width).T
