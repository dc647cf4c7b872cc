"""A small trainable vision transformer, for use without any download."""

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from semantica.condition import Stream
from semantica.errors import UserError
from semantica.model.image_encoder import ImageEncoder
from semantica.model.layers import MLP, RMSNorm, SelfAttention, block_runner, rotary_grid


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn, self.mlp = SelfAttention(width, heads), MLP(width, 4 * width, 0.0)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, N, C], [N, D/2]
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class ViTEncoder(ImageEncoder):
    """A small trainable vision transformer with a convolutional stem, for use without any download.

    Early convolutions make short trainings work (Xiao et al., arXiv 2106.14881).

    Args:
        image_size: side of the input image; divisible by `patch_size`.
        patch_size: a power of two: one stride-2 convolution for each factor of two.
        width, depth, heads: of the transformer.
    """

    trainable = True
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, image_size: int = 32, patch_size: int = 4, width: int = 192, depth: int = 3, heads: int = 6):
        super().__init__()
        self.gradient_checkpointing = False
        if patch_size < 2 or patch_size & (patch_size - 1) or image_size % patch_size:
            raise UserError(f"patch_size={patch_size} must be a power of two that divides image_size={image_size}")
        stem, channels, steps = [], 3, patch_size.bit_length() - 1
        for step in range(steps):
            out = width >> (steps - 1 - step)
            stem += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.SiLU()]
            channels = out
        self.stem = nn.Sequential(*stem, nn.Conv2d(channels, width, 1))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = RMSNorm(width)
        angles = rotary_grid(image_size // patch_size, image_size // patch_size, width // heads)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)

    @property
    def token_dim(self) -> int:
        return self.config.width

    @property
    def patches(self) -> int:
        """Patch tokens of an image, a square grid row by row; they come last."""
        return (self.config.image_size // self.config.patch_size) ** 2

    def forward(self, images: Tensor) -> Stream:
        """Images `[B, 3, S, S]` in [-1, 1] to tokens `[B, (S / patch)^2, C]` and their mean as the pooled vector."""
        x = self.stem(images).flatten(2).transpose(1, 2)
        run = block_runner(self)
        for block in self.blocks:
            x = run(block, x, self.rope_cos, self.rope_sin)
        x = self.norm(x)
        return Stream(x, x.mean(1))
