"""The encoders of Stable Diffusion and its kin as encoders of this package, see `semantica.model.encoders`."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from semantica.condition import Stream
from semantica.errors import UserError
from semantica.images import fit, to_tensor
from semantica.tokens import ClipTokenizer

# prompts that exported graphs are compared on
EXAMPLES = ("a lighthouse on a cliff at dusk, oil on canvas", "two red bicycles, photograph", "")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipTexts(nn.Module):
    """Prompts to the tokens of CLIP's text tower, or of SDXL's two.

    Args:
        tokenizers, towers: one of each (`CLIPTextModel`), or two (SDXL's, the second with a projection): then tokens
            are those of the last layer but one, side by side, and pooled is the second's projection.
    """

    input_dtype, trainable = torch.int64, False

    def __init__(self, tokenizers: Sequence[ClipTokenizer], towers: Sequence[nn.Module]):
        super().__init__()
        lengths = {tokenizer.length for tokenizer in tokenizers}
        if len(tokenizers) != len(towers) or len(lengths) != 1:
            raise UserError(
                f"{len(tokenizers)} tokenizers of lengths {sorted(lengths)} for {len(towers)} text encoders"
            )
        self.tokenizers, self.towers = tuple(tokenizers), nn.ModuleList(towers)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one prompt: a row of numbers for each tower."""
        return len(self.tokenizers), self.tokenizers[0].length

    @property
    def token_dim(self) -> int:
        return sum(tower.config.hidden_size for tower in self.towers)

    def prepare(self, texts: Sequence[str]) -> Tensor:
        """int64 `[B, towers, length]`. Raises `UserError` for something else than text."""
        return torch.stack([torch.from_numpy(tokenizer(texts)) for tokenizer in self.tokenizers], 1)

    def examples(self, count: int) -> Tensor:
        return self.prepare([EXAMPLES[i % len(EXAMPLES)] for i in range(count)])

    @property
    def tokenizer(self) -> ClipTokenizer:
        """Of the first tower; in SDXL's other one words have the same places."""
        return self.tokenizers[0]

    @torch.no_grad()
    def forward(self, numbers: Tensor) -> Stream:
        """Tokens `[B, length, C]`, and for SDXL the pooled vector `[B, P]`."""
        if len(self.towers) == 1:
            return Stream(self.towers[0](numbers[:, 0]).last_hidden_state)
        made = [tower(numbers[:, i], output_hidden_states=True) for i, tower in enumerate(self.towers)]
        return Stream(torch.cat([out.hidden_states[-2] for out in made], -1), made[-1].text_embeds)


class ClipPictures(nn.Module):
    """Pictures to CLIP's projected vector, one token each, or to the tokens of its last layer but one.

    Args:
        tower: a `CLIPVisionModelWithProjection`. tokens: what "plus" adapters read, instead of the vector.
        mean, std: per-channel normalisation of pictures in [0, 1].
    """

    input_dtype, trainable = torch.float32, False

    def __init__(
        self,
        tower: nn.Module,
        tokens: bool = False,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ):
        super().__init__()
        self.tower, self.tokens, self.image_size = tower, tokens, tower.config.image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return 3, self.image_size, self.image_size

    @property
    def token_dim(self) -> int:
        return self.tower.config.hidden_size if self.tokens else self.tower.config.projection_dim

    def prepare(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size to `[B, 3, S, S]` in [-1, 1]: the square in their middle. Raises `UserError`."""
        for picture in pictures:
            if not isinstance(picture, Image.Image):
                raise UserError(f"a condition is a {type(picture).__name__}: give Pillow images, or one array of all")
        return to_tensor([fit(picture.convert("RGB"), self.image_size) for picture in pictures])

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Stream:
        """`[B, 3, S, S]` in [-1, 1] to tokens `[B, 1 or M, C]`."""
        return self.encode(((pictures.clamp(-1, 1) + 1) / 2 - self.mean) / self.std)

    def encode(self, pixels: Tensor) -> Stream:
        pixels = pixels.to(self.tower.dtype)
        if self.tokens:
            return Stream(self.tower(pixels, output_hidden_states=True).hidden_states[-2])
        return Stream(self.tower(pixels).image_embeds[:, None])

    @torch.no_grad()
    def blank(self) -> Stream:
        """What stands for no picture: zeros, or for "plus" adapters the tokens of pixels of the mean colour."""
        if self.tokens:
            return self.encode(self.mean.new_zeros(1, *self.input_shape))
        return Stream(self.mean.new_zeros(1, 1, self.token_dim))


class VersatilePictures(ClipPictures):
    """Pictures to all of CLIP's tokens, projected, in units of the projected vector's length (Versatile Diffusion,
    arXiv 2211.08332, as diffusers runs it).
    """

    def __init__(self, tower: nn.Module, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD):
        super().__init__(tower, True, mean, std)

    @property
    def token_dim(self) -> int:
        return self.tower.config.projection_dim

    def encode(self, pixels: Tensor) -> Stream:
        hidden = self.tower(pixels.to(self.tower.dtype)).last_hidden_state
        tokens = self.tower.visual_projection(self.tower.vision_model.post_layernorm(hidden))
        return Stream(tokens / tokens[:, :1].norm(dim=-1, keepdim=True))

    @torch.no_grad()
    def blank(self) -> Stream:
        """Of a black picture, up to half a step of 8 bits, which is what diffusers shows."""
        dark = self.mean.new_full((1, *self.input_shape), 0.5 / 255)
        return self.encode((dark - self.mean) / self.std)
