"""Named model sizes."""

from typing import Any

from semantica.errors import UserError

# settings of `UViT`, and of the trainable `ViTEncoder` that goes with the size: `grid` patches along a side
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        image_size=32,
        patch_size=2,
        channels=(48, 96),
        depths=(2, 2),
        width=192,
        depth=3,
        heads=3,
        emb_dim=256,
        encoder=dict(width=128, depth=3, heads=2, grid=8),
    ),
    "small": dict(
        image_size=64,
        patch_size=1,
        channels=(96, 192),
        depths=(2, 2),
        width=512,
        depth=10,
        heads=8,
        emb_dim=512,
        encoder=dict(width=384, depth=6, heads=6, grid=16),
    ),
    "base": dict(
        image_size=256,
        patch_size=2,
        channels=(128, 256, 512),
        depths=(2, 2, 2),
        width=1024,
        depth=14,
        heads=16,
        emb_dim=768,
        dropout=0.1,
        encoder=dict(width=768, depth=12, heads=12, grid=16),
    ),
    "large": dict(
        image_size=256,
        patch_size=2,
        channels=(128, 256, 512),
        depths=(3, 3, 3),
        width=2048,
        depth=24,
        heads=16,
        emb_dim=1024,
        dropout=0.1,
        encoder=dict(width=1024, depth=24, heads=16, grid=16),
    ),
}


def preset(name: str, image_size: int | None = None) -> dict[str, Any]:
    """Settings of `UViT` for a named size; another image size changes the patch size, so that the grid stays.

    Raises:
        UserError: the name is unknown, or the grid cannot be kept at that image size.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown: expected one of {', '.join(PRESETS)}")
    settings = {key: value for key, value in PRESETS[name].items() if key != "encoder"}
    if image_size is not None:
        grid = settings["image_size"] // settings["patch_size"]
        if image_size < grid or image_size % grid:
            raise UserError(f"image size {image_size} does not fit preset {name!r}: use a multiple of {grid}")
        settings.update(image_size=image_size, patch_size=image_size // grid)
    return settings


def encoder_preset(name: str, image_size: int) -> dict[str, Any]:
    """Settings of the trainable `ViTEncoder` that goes with a named size; always as many tokens."""
    settings = dict(PRESETS[name]["encoder"])
    patch_size = image_size // settings.pop("grid")
    return dict(settings, image_size=image_size, patch_size=patch_size)
