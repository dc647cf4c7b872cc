"""Named model sizes."""

from semantica.errors import UserError

# settings of UViT, and of the trainable encoder that goes with the size
PRESETS = {
    "tiny": dict(
        image_size=32, patch_size=2, channels=(48, 96), depths=(2, 2), width=192, depth=3, heads=3, emb_dim=256
    ),
    "small": dict(
        image_size=64, patch_size=1, channels=(96, 192), depths=(2, 2), width=512, depth=10, heads=8, emb_dim=512
    ),
    "base": dict(
        image_size=256, patch_size=2, channels=(128, 256, 512), depths=(2, 2, 2), width=1024, depth=14, heads=16,
        emb_dim=768, dropout=0.1,
    ),
    "large": dict(
        image_size=256, patch_size=2, channels=(128, 256, 512), depths=(3, 3, 3), width=2048, depth=24, heads=16,
        emb_dim=1024, dropout=0.1,
    ),
}  # fmt: skip
ENCODERS = {
    "tiny": dict(width=128, depth=3, heads=2),
    "small": dict(width=384, depth=6, heads=6),
    "base": dict(width=768, depth=12, heads=12),
    "large": dict(width=1024, depth=24, heads=16),
}


def preset(name: str, image_size: int | None = None) -> dict:
    """Settings of `UViT` for a named size; another image size changes the patch size, so that the grid stays.

    Raises:
        UserError: the name is unknown, or the grid cannot be kept at that image size.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown: expected one of {', '.join(PRESETS)}")
    settings = dict(PRESETS[name])
    if image_size is not None:
        grid = settings["image_size"] // settings["patch_size"]
        if image_size < grid or image_size % grid:
            raise UserError(f"image size {image_size} does not fit preset {name!r}: use a multiple of {grid}")
        settings.update(image_size=image_size, patch_size=image_size // grid)
    return settings


def encoder_preset(name: str, image_size: int) -> dict:
    """Settings of the trainable `ViTEncoder` that goes with a named size; always 64 tokens at tiny, 256 above."""
    side = 8 if name == "tiny" else 16
    return dict(ENCODERS[name], image_size=image_size, patch_size=image_size // side)
