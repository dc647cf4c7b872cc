"""The Inception network behind published FIDs (2015-12-05), its 2048 features, with weights from a local file.

Torch's names of layers, as torch-fidelity and pytorch-fid have them: their file becomes safetensors by
`safetensors.torch.save_file(torch.load(file, weights_only=True), out)`. TensorFlow's averages leave the padding out,
and its last block takes a maximum where all others average.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from semantica.errors import UserError, first_line

SIDE = 299
# of the classifier that the file has and features do not need; batch norms count their steps in some versions of it
UNUSED = ("fc.weight", "fc.bias")


class Convolution(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def square(channels: int, out: int, side: int, stride: int = 1) -> Convolution:
    """Keeps the size, or halves it without padding."""
    return Convolution(channels, out, side, stride, 0 if stride > 1 else side // 2)


def row(channels: int, out: int, length: int) -> Convolution:
    return Convolution(channels, out, (1, length), padding=(0, length // 2))


def column(channels: int, out: int, length: int) -> Convolution:
    return Convolution(channels, out, (length, 1), padding=(length // 2, 0))


class Block(nn.Module):
    """Branches side by side: chains of layers by name, where a tuple of two stands for both, joined."""

    def __init__(self, layers: dict[str, nn.Module], chains: tuple, pool: str):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.chains, self.pool = chains, pool

    def forward(self, x: Tensor) -> Tensor:
        made = [self.follow(x, chain) for chain in self.chains]
        if self.pool == "average":
            made.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        elif self.pool == "maximum":
            made.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            made.append(F.max_pool2d(x, 3, 2))
        return torch.cat(made, 1)

    def follow(self, x: Tensor, chain: tuple) -> Tensor:
        for step in chain:
            if isinstance(step, tuple):
                x = torch.cat([getattr(self, name)(x) for name in step], 1)
            else:
                x = getattr(self, step)(x)
        return x


def chain(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}_{i}" for i in range(1, count + 1))


def block_a(width: int, pooled: int) -> Block:
    layers = {
        "branch1x1": square(width, 64, 1),
        "branch5x5_1": square(width, 48, 1), "branch5x5_2": square(48, 64, 5),
        "branch3x3dbl_1": square(width, 64, 1), "branch3x3dbl_2": square(64, 96, 3),
        "branch3x3dbl_3": square(96, 96, 3), "branch_pool": square(width, pooled, 1),
    }  # fmt: skip
    return Block(layers, (("branch1x1",), chain("branch5x5", 2), chain("branch3x3dbl", 3)), "average")


def block_b(width: int) -> Block:
    layers = {
        "branch3x3": square(width, 384, 3, 2), "branch3x3dbl_1": square(width, 64, 1),
        "branch3x3dbl_2": square(64, 96, 3), "branch3x3dbl_3": square(96, 96, 3, 2),
    }  # fmt: skip
    return Block(layers, (("branch3x3",), chain("branch3x3dbl", 3)), "none")


def block_c(width: int, inner: int) -> Block:
    layers = {
        "branch1x1": square(width, 192, 1), "branch7x7_1": square(width, inner, 1),
        "branch7x7_2": row(inner, inner, 7), "branch7x7_3": column(inner, 192, 7),
        "branch7x7dbl_1": square(width, inner, 1), "branch7x7dbl_2": column(inner, inner, 7),
        "branch7x7dbl_3": row(inner, inner, 7), "branch7x7dbl_4": column(inner, inner, 7),
        "branch7x7dbl_5": row(inner, 192, 7), "branch_pool": square(width, 192, 1),
    }  # fmt: skip
    return Block(layers, (("branch1x1",), chain("branch7x7", 3), chain("branch7x7dbl", 5)), "average")


def block_d(width: int) -> Block:
    layers = {
        "branch3x3_1": square(width, 192, 1), "branch3x3_2": square(192, 320, 3, 2),
        "branch7x7x3_1": square(width, 192, 1), "branch7x7x3_2": row(192, 192, 7),
        "branch7x7x3_3": column(192, 192, 7), "branch7x7x3_4": square(192, 192, 3, 2),
    }  # fmt: skip
    return Block(layers, (chain("branch3x3", 2), chain("branch7x7x3", 4)), "none")


def block_e(width: int, pool: str) -> Block:
    layers = {
        "branch1x1": square(width, 320, 1), "branch3x3_1": square(width, 384, 1),
        "branch3x3_2a": row(384, 384, 3), "branch3x3_2b": column(384, 384, 3),
        "branch3x3dbl_1": square(width, 448, 1), "branch3x3dbl_2": square(448, 384, 3),
        "branch3x3dbl_3a": row(384, 384, 3), "branch3x3dbl_3b": column(384, 384, 3),
        "branch_pool": square(width, 192, 1),
    }  # fmt: skip
    threes = ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b"))
    doubles = ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b"))
    return Block(layers, (("branch1x1",), threes, doubles), pool)


class Inception(nn.Module):
    """Pictures uint8 `[B, 3, H, W]` of any size to features `[B, 2048]`."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = square(3, 32, 3, 2), Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = square(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = square(64, 80, 1), Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = block_b(288), block_c(768, 128), block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e, self.Mixed_7a = block_c(768, 160), block_c(768, 192), block_d(768)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "average"), block_e(2048, "maximum")

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        x = (resized(pictures.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


def resized(x: Tensor, side: int) -> Tensor:
    """Bilinear as TensorFlow 1 has it, for published figures: source = target * scale, no half pixel."""
    for axis in (2, 3):
        size = x.shape[axis]
        place = torch.arange(side, device=x.device, dtype=torch.float32) * (size / side)
        low = place.long()
        high, share = (low + 1).clamp(max=size - 1), place - low
        share = share.view(-1, 1) if axis == 2 else share
        first = x.index_select(axis, low)
        x = first + (x.index_select(axis, high) - first) * share
    return x


def load_inception(file: Path) -> Inception:
    """The network with the weights of a safetensors file, for evaluation.

    Raises:
        UserError: the file is missing, no safetensors, or holds another network.
    """
    network = Inception()
    expected = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {first_line(error)}") from error
    found = {
        name: value
        for name, value in weights.items()
        if name not in UNUSED and not name.endswith("num_batches_tracked")
    }
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += sorted(name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape)
    if wrong:
        what = f"{len(wrong)} of its tensors are missing, too many or of another shape, such as {wrong[0]}"
        raise UserError(f"{file} is not FID's Inception network: {what}; give pt_inception-2015-12-05 as safetensors")
    network.load_state_dict(found, strict=False)
    return network.requires_grad_(False).eval()
