"""From dense picture tokens and class embeddings to a logit for each class and place (Cho et al., arXiv 2303.11797)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semantica.segmentation.layers import ClassAggregation, SpatialAggregation, Upsample
from semantica.segmentation.sizes import Sizes

# logit of a class that was left out: more classes than one pass takes
ABSENT = -100.0


def cost_volume(image: Tensor, text: Tensor) -> Tensor:
    """Cosines between every place and every class (eq. 1).

    Args:
        image: `[B, C, H, W]`. text: `[B or 1, T, P, C]`, each class in P templates.

    Returns:
        `[B, T, P, H, W]`.
    """
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=-1)
    return torch.einsum("bchw,btpc->btphw", image, text.expand(len(image), -1, -1, -1))


def chosen(cost: Tensor, count: int) -> Tensor:
    """The likeliest classes of each picture, by their largest cosine at any place: int64 `[B, count]`."""
    return cost.flatten(2).amax(-1).topk(count, sorted=False).indices


class Aggregator(nn.Module):
    """The cost volume's embedding, its aggregation over places and classes, and the decoder.

    Args:
        sizes: see `Sizes`. width: of tokens and class embeddings. inner: of the vision tower's layers.
        templates: that each class is embedded in.
    """

    def __init__(self, sizes: Sizes, width: int, inner: int, templates: int):
        super().__init__()
        self.sizes, dim, guide = sizes, sizes.hidden, sizes.guidance
        self.embed = nn.Conv2d(templates, dim, 7, padding=3)
        self.visual = nn.Sequential(nn.Conv2d(width, guide, 3, padding=1), nn.ReLU())
        self.textual = nn.Sequential(nn.Linear(width, guide), nn.ReLU())
        self.spatial = nn.ModuleList(
            SpatialAggregation(dim, guide, sizes.heads, sizes.window) for _ in range(sizes.layers)
        )
        self.classes = nn.ModuleList(
            ClassAggregation(dim, guide, sizes.heads, sizes.pool, sizes.padding) for _ in range(sizes.layers)
        )
        # what the decoder sees of the layers of the vision tower, twice and four times as large
        self.details = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(inner, raised, s, s), nn.Conv2d(raised, out, 3, padding=1), nn.ReLU())
            for raised, out, s in zip(sizes.raised, sizes.projected, (2, 4), strict=True)
        )
        widths = (dim, *sizes.decoder)
        self.decoder = nn.ModuleList(
            Upsample(a, guide, b) for a, guide, b in zip(widths, sizes.projected, widths[1:], strict=False)
        )
        self.head = nn.Conv2d(sizes.decoder[-1], 1, 3, padding=1)

    def forward(self, image: Tensor, text: Tensor, inner: Sequence[Tensor]) -> Tensor:
        """Logits of each class at four times the resolution of the tokens.

        Args:
            image: dense tokens `[B, width, H, W]`. text: `[T, P, width]`. inner: of two layers of the vision tower,
                the earlier first, `[B, inner, H, W]`.

        Returns:
            `[B, T, 4H, 4W]`; `ABSENT` for classes beyond the most that one pass takes.
        """
        text, count = text[None], text.shape[0]
        cost, kept = cost_volume(image, text), None
        if count > self.sizes.padding:
            kept = chosen(cost, self.sizes.padding)
            cost, text = (
                torch.stack([part[i % len(part)][own] for i, own in enumerate(kept)]) for part in (cost, text)
            )
        logits = self.aggregate(cost, image, text, inner)
        if kept is None:
            return logits
        whole = logits.new_full((len(logits), count, *logits.shape[2:]), ABSENT)
        return whole.scatter(1, kept[..., None, None].expand_as(logits), logits)

    def aggregate(self, cost: Tensor, image: Tensor, text: Tensor, inner: Sequence[Tensor]) -> Tensor:
        """cost `[B, T, P, H, W]` and text `[B or 1, T, P, width]` to logits `[B, T, 4H, 4W]`."""
        b, t = cost.shape[:2]
        x = self.embed(cost.flatten(0, 1))
        x = x.unflatten(0, (b, t)).permute(0, 1, 3, 4, 2)
        visual = self.visual(image).permute(0, 2, 3, 1)[:, None]
        textual = self.textual(F.normalize(text.mean(2), dim=-1))
        for spatial, classes in zip(self.spatial, self.classes, strict=True):
            x = classes(spatial(x, visual), textual)
        x = x.permute(0, 1, 4, 2, 3).flatten(0, 1)
        for up, detail, seen in zip(self.decoder, self.details, inner, strict=True):
            x = up(x, detail(seen))
        return self.head(x).reshape(b, t, *x.shape[2:])
