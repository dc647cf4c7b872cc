"""The embedding of noise levels from a bundle's weights, without its graph: what time-step guidance scales noise by."""

import numpy as np
from safetensors import safe_open

from semantica.discrete import DiscreteSchedule
from semantica.engines.bundle import WEIGHTS, Bundle
from semantica.errors import UserError


def noise_embedding(bundle: Bundle, logsnr: np.ndarray, framework: str) -> np.ndarray:
    """Embeddings float32 `[N, E]` of noise levels `[N]`, to which a condition's is added: two layers over sinusoids.

    framework: "np" or "pt", what reads the weights; numpy has no bf16.

    Raises:
        UserError: the bundle's network embeds its noise levels in another way.
    """
    unet = bundle.manifest["model"].get("unet") or {}
    if unet.get("class") == "UViT":
        names, waves = ("unet.embed_noise.net.0", "unet.embed_noise.net.2"), sinusoids(logsnr, unet["emb_dim"])
    else:
        names, waves = discrete(bundle, unet, logsnr)
    with safe_open(bundle.folder / WEIGHTS, framework) as file:
        if not {f"{name}.{part}" for name in names for part in ("weight", "bias")} <= {*file.keys()}:
            raise UserError(f"{bundle.folder}: its network embeds noise levels in a way that is not known here")

        def layer(name: str, x: np.ndarray) -> np.ndarray:
            weight, bias = (file.get_tensor(f"{name}.{part}") for part in ("weight", "bias"))
            if framework == "pt":
                weight, bias = weight.float().numpy(), bias.float().numpy()
            return x @ weight.astype(np.float32).T + bias.astype(np.float32)

        hidden = layer(names[0], waves)
        return layer(names[1], hidden / (1 + np.exp(-hidden)))


def sinusoids(logsnr: np.ndarray, width: int) -> np.ndarray:
    """As `semantica.model.layers.NoiseEmbedding`."""
    periods = np.logspace(-1, 7, width // 2, base=2, dtype=np.float32)
    phase = logsnr.astype(np.float32)[:, None] * (2 * np.pi / periods).astype(np.float32)
    return np.concatenate([np.sin(phase), np.cos(phase)], -1)


def discrete(bundle: Bundle, unet: dict, logsnr: np.ndarray) -> tuple[tuple[str, str], np.ndarray]:
    """Names of a UNet of diffusers' layers, and sinusoids of timesteps as its `Timesteps` makes them."""
    levels = DiscreteSchedule.of(bundle.manifest["model"]["scheduler"]).levels
    # levels fall with the timestep
    t = np.interp(-logsnr.astype(np.float64), -levels, np.arange(len(levels)))
    width = unet["block_out_channels"][0]
    half = width // 2
    rates = np.exp(-np.log(10000) * np.arange(half) / (half - unet.get("freq_shift", 0)))
    waves = np.sin(t[:, None] * rates), np.cos(t[:, None] * rates)
    if unet.get("flip_sin_to_cos", True):
        waves = waves[::-1]
    return ("unet.unet.time_embedding.linear_1", "unet.unet.time_embedding.linear_2"), np.concatenate(waves, -1).astype(
        np.float32
    )
