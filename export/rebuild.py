"""The networks of a diffusers pipeline from its bundle: as the manifest describes them, with the bundle's weights.

What is compiled from a network takes it from here, so that a bundle is all that it needs. No code and no class comes
out of a bundle: it names rows of tables.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from semantica.discrete import schedule_of
from semantica.engines.bundle import WEIGHTS, Bundle
from semantica.engines.network import DTYPES
from semantica.errors import UserError, first_line
from semantica.fused.accelerate import accelerate
from semantica.fused.denoiser import UNetDenoiser
from semantica.fused.towers import ClipPictures, ClipTexts
from semantica.model.conditioner import Conditioner
from semantica.model.encoders import refuse_code
from semantica.pipelines.unets import UNetPipeline
from semantica.pipelines.weights import quiet
from semantica.tokens import ClipTokenizer

TOWERS = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection)}
# what diffusers writes as `encoder_hid_dim_type` of a UNet with IP-Adapters, and refuses to build
ADAPTED = "ip_image_proj"
PROJECTIONS = "encoder_hid_proj.image_projection_layers."


@dataclass(frozen=True)
class Encoder:
    """How a kind of encoder goes into a manifest and comes out of it.

    describe: `(encoder) -> dict` of JSON. build: `(that dict, bundle, name of its input) -> encoder`, without weights.
    """

    describe: Callable[[Any], dict[str, Any]]
    build: Callable[[Mapping[str, Any], Bundle, str], nn.Module]


def described_tower(tower: nn.Module) -> dict[str, Any]:
    """The configuration of a tower as JSON, with its class."""
    config = {key: value for key, value in tower.config.to_diff_dict().items() if not key.startswith("_")}
    return {"class": type(tower).__name__, **json.loads(json.dumps(config, default=str))}


def tower_of(settings: Mapping[str, Any], bundle: Bundle) -> nn.Module:
    """An empty tower. Raises `UserError` for another class than those of `TOWERS`, or code to run."""
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    kind = settings.pop("class", None)
    if kind not in TOWERS:
        raise UserError(f"{bundle.folder} asks for other code as its encoder: it is never loaded")
    refuse_code(settings, bundle.folder)
    # by another name transformers would fetch an implementation
    config = TOWERS[kind].config_class(**settings | {"attn_implementation": "sdpa"})
    return TOWERS[kind](config)


def describe_texts(encoder: ClipTexts) -> dict[str, Any]:
    return {"towers": [described_tower(tower) for tower in encoder.towers]}


def build_texts(settings: Mapping[str, Any], bundle: Bundle, name: str) -> ClipTexts:
    tokenizers = [ClipTokenizer(bundle.folder / place) for place in bundle.tokenizers[name]]
    return ClipTexts(tokenizers, [tower_of(tower, bundle) for tower in settings["towers"]])


def describe_pictures(encoder: ClipPictures) -> dict[str, Any]:
    scaling = {"mean": encoder.mean.flatten().tolist(), "std": encoder.std.flatten().tolist()}
    return {"tower": described_tower(encoder.tower), "tokens": encoder.tokens, **scaling}


def build_pictures(settings: Mapping[str, Any], bundle: Bundle, name: str) -> ClipPictures:
    tower = tower_of(settings["tower"], bundle)
    return ClipPictures(tower, settings["tokens"], settings["mean"], settings["std"])


# by class
ENCODERS = {
    ClipTexts.__name__: Encoder(describe_texts, build_texts),
    ClipPictures.__name__: Encoder(describe_pictures, build_pictures),
}


def describe_encoders(encoders: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What a manifest says of the encoders of several inputs."""
    kinds = {name: type(part).__name__ for name, part in encoders.items()}
    settings = {name: ENCODERS[kinds[name]].describe(part) for name, part in encoders.items()}
    return {"class": Conditioner.__name__, "parts": kinds, "settings": settings}


def describe_scales(crossings: Sequence[Attention]) -> dict[str, Any]:
    """How much each IP-Adapter weighs in each cross-attention, where there are any: no weight says it."""
    scales = [list(attn.processor.scale) for attn in crossings]
    return {"scales": scales} if any(scales) else {}


def rebuilt(bundle: Bundle) -> UNetPipeline:
    """The pipeline that a bundle was exported from, in the bundle's precision, on the CPU; its unconditional branch is
    that of the bundle's null.safetensors, and is not in it.

    Raises:
        UserError: a bundle of an older version, which does not describe its encoders, or one whose descriptions and
            weights disagree.
    """
    model = bundle.manifest["model"]
    said = model.get("encoder") if isinstance(model.get("encoder"), Mapping) else {}
    if not isinstance(said.get("settings"), Mapping) or set(said["settings"]) != set(bundle.inputs):
        raise UserError(f"{bundle.folder} does not describe its encoders, as those of older versions: export it again")
    with fitting(bundle):
        weights = load_file(bundle.folder / WEIGHTS)
        with init_empty_weights(include_buffers=False), quiet():
            encoders = {name: encoder_of(name, said, bundle) for name in bundle.inputs}
            encoder = Conditioner(encoders)
            config = configuration(model["unet"], "UNet2DConditionModel", bundle)
            unet = unet_of(config, under(weights, "unet.unet."), model.get("scales", []), bundle.sizes)
            vae = AutoencoderKL.from_config(configuration(model["vae"], "AutoencoderKL", bundle))
        for module, name in ((unet, "unet.unet."), (encoder, "encoder."), (vae, "vae.")):
            module.load_state_dict(under(weights, name), assign=True)
            module.eval().requires_grad_(False)
        # numbers that no file holds
        nn.Module.to(encoder, DTYPES[bundle.precision])
        denoiser = UNetDenoiser(
            accelerate(unet), schedule_of(model["scheduler"]), stream_names=tuple(bundle.manifest["streams"])
        )
        return UNetPipeline(denoiser.eval().requires_grad_(False), encoder, accelerate(vae))


@contextmanager
def fitting(bundle: Bundle) -> Iterator[None]:
    """What is raised where a network cannot be built of a bundle becomes one line."""
    try:
        yield
    except UserError:
        raise
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, SafetensorError,
        StrictDataclassError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise UserError(
            f"{bundle.folder}: what it says of its networks and its weights do not fit ({first_line(error)}): "
            "export the bundle again"
        ) from error


def under(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def configuration(settings: Mapping[str, Any], kind: str, bundle: Bundle) -> dict[str, Any]:
    """What a model of diffusers is built from. Raises `UserError` for one of another class, or code to run."""
    if settings["class"] != kind:
        raise UserError(f"{bundle.folder} asks for other code than {kind}: it is never loaded")
    refuse_code(dict(settings), bundle.folder)
    return {key: value for key, value in settings.items() if key != "class"}


def encoder_of(name: str, said: Mapping[str, Any], bundle: Bundle) -> nn.Module:
    kind = said["parts"][name]
    if kind not in ENCODERS:
        raise UserError(f"{bundle.folder} asks for other code as its encoder: it is never loaded")
    return ENCODERS[kind].build(said["settings"][name], bundle, name)


def unet_of(
    config: dict[str, Any], weights: Mapping[str, Tensor], scales: Sequence[Sequence[float]], sizes: Sequence[int]
) -> UNet2DConditionModel:
    """An empty UNet with the IP-Adapters that there are weights of.

    scales: of each adapter, for each cross-attention. sizes: tokens of the text, and of each adapter's pictures.
    """
    if config.get("encoder_hid_dim_type") == ADAPTED:
        config = config | {"encoder_hid_dim_type": None}
    unet = UNet2DConditionModel.from_config(config)
    projections = [*projections_of(weights)]
    if projections:
        crossing = [
            (name, module)
            for name, module in unet.named_modules()
            if isinstance(module, Attention) and module.is_cross_attention
        ]
        for (name, attn), own in zip(crossing, scales, strict=True):
            hidden, width = weights[f"{name}.processor.to_k_ip.0.weight"].shape
            attn.set_processor(IPAdapterAttnProcessor2_0(hidden, width, tuple(sizes[1:]), list(own)))
        if unet.encoder_hid_proj is not None:
            # as diffusers has it where adapters stand beside a projection of the text
            unet.text_encoder_hid_proj = unet.encoder_hid_proj
        unet.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
        unet.config.encoder_hid_dim_type = ADAPTED
    return unet


def projections_of(weights: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """What projects the pictures of each IP-Adapter, empty, of the kind and the sizes that the weights have."""
    count = len({name.removeprefix(PROJECTIONS).split(".")[0] for name in weights if name.startswith(PROJECTIONS)})
    for i in range(count):
        shapes = {name: weight.shape for name, weight in under(weights, f"{PROJECTIONS}{i}.").items()}
        if "image_embeds.weight" in shapes:
            (made, seen), (width,) = shapes["image_embeds.weight"], shapes["norm.weight"]
            yield ImageProjection(seen, width, made // width)
        elif "latents" in shapes:
            _, queries, hidden = shapes["latents"]
            heads = shapes["layers.0.attn.to_q.weight"][0] // 64
            seen, width = shapes["proj_in.weight"][1], shapes["proj_out.weight"][0]
            yield IPAdapterPlusImageProjection(seen, width, hidden, heads=heads, num_queries=queries)
        else:
            yield IPAdapterFullImageProjection(shapes["ff.net.0.proj.weight"][1], shapes["norm.weight"][0])
