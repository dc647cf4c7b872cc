"""Folders of diffusers' Stable Diffusion pipelines behind the call of every pipeline here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from semantica.condition import Stream
from semantica.discrete import DiscreteSchedule
from semantica.errors import UserError, first_line
from semantica.files import read_json
from semantica.fused.accelerate import accelerate
from semantica.fused.denoiser import UNetDenoiser
from semantica.fused.towers import CLIP_MEAN, CLIP_STD, ClipPictures, ClipTexts, VersatilePictures
from semantica.inputs import Prepared
from semantica.model.conditioner import Conditioner
from semantica.model.encoders import refuse_code
from semantica.pipelines.kinds import INDEX, at_once, usual_guidance
from semantica.pipelines.lora import add_lora
from semantica.pipelines.networks import NetworkPipeline
from semantica.pipelines.runfolder import readable
from semantica.pipelines.weights import load_model, quiet
from semantica.tokens import ClipTokenizer

# the parts that each kind of pipeline must have; nothing outside `CLASSES` is ever built
KINDS = {
    "StableDiffusionPipeline": ("unet", "vae", "scheduler", "text_encoder", "tokenizer"),
    "StableDiffusionXLPipeline": (
        "unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
    ),
    "StableDiffusionImageVariationPipeline": ("unet", "vae", "scheduler", "image_encoder"),
    # arXiv 2211.08332; of the whole model what makes variations
    "VersatileDiffusionPipeline": ("image_unet", "vae", "scheduler", "image_encoder"),
    "VersatileDiffusionImageVariationPipeline": ("image_unet", "vae", "scheduler", "image_encoder"),
}  # fmt: skip
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "image_unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "image_encoder": ("CLIPVisionModelWithProjection",),
}
SCHEDULER = "scheduler/scheduler_config.json"


class UNetPipeline(NetworkPipeline):
    """Text, pictures or both to images by a UNet of diffusers, its encoders and its autoencoder.

    Args:
        unet: the denoiser; encoder: an encoder for each of its streams; vae: an `AutoencoderKL`.
    """

    def __init__(self, unet: UNetDenoiser, encoder: Conditioner, vae: nn.Module):
        super().__init__(unet, encoder, unet.schedule)
        self.vae = vae
        self.guidance, self.max_samples = usual_guidance(unet.unet.config), at_once(unet.sample_shape[-1])

    @classmethod
    def load(
        cls,
        source: str | Path,
        ip_adapter: Path | None = None,
        ip_scale: float = 1.0,
        lora: Path | None = None,
        lora_scale: float = 1.0,
    ) -> Self:
        """A folder that diffusers' `save_pretrained` wrote, or a download of the same layout; its safety checker is
        not used.

        Args:
            ip_adapter: safetensors of an IP-Adapter (arXiv 2308.06721); its image encoder is the folder's own, or in
                the folder `image_encoder` beside the file. ip_scale: how much its pictures weigh.
            lora, lora_scale: see `semantica.pipelines.lora.add_lora`.

        Raises:
            UserError: another kind of pipeline, a part that is missing or not in safetensors, or code to run.
        """
        folder = Path(source)
        index = check_folder(folder)
        parts = KINDS[index["_class_name"]]
        with readable(folder):
            # the denoiser is the first of its parts
            unet, vae = part_of(folder, parts[0]), accelerate(part_of(folder, "vae"))
            side = unet.config.sample_size
            if type(side) is not int or side < 1:
                raise UserError(f"{folder / parts[0]} has sample_size {side!r}: only squares are sampled")
            check_vae(vae, folder / "vae", unet.config.in_channels)
            schedule = DiscreteSchedule.from_scheduler(read_json(folder / SCHEDULER), side)
            encoders: dict[str, nn.Module] = {}
            numbers = [n for n in ("", "_2") if f"tokenizer{n}" in parts]
            towers = [part_of(folder, f"text_encoder{n}") for n in numbers]
            if lora is not None:
                add_lora({"unet": unet, **{f"text_encoder{n}": t for n, t in zip(numbers, towers)}}, lora, lora_scale)
            accelerate(unet)
            if numbers:
                encoders["text"] = ClipTexts([ClipTokenizer(folder / f"tokenizer{n}") for n in numbers], towers)
            else:
                encoders["image"] = pictures(folder, versatile=parts[0] == "image_unet")
            if ip_adapter is not None:
                if not numbers:
                    raise UserError(f"{folder} makes variations of pictures: an IP-Adapter goes beside text")
                encoders["image"] = adapt(unet, ip_adapter, ip_scale, folder)
                accelerate(unet)
            encoder = Conditioner(encoders).eval().requires_grad_(False)
            # the first time that they run
            null = {name: blank(part, index) for name, part in encoders.items()}
        return cls(UNetDenoiser(unet, schedule, null).eval().requires_grad_(False), encoder, vae)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.unet.sample_shape

    @property
    def side(self) -> int:
        # each level of the autoencoder but the last halves it
        return self.sample_shape[-1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to(self, device: torch.device | str) -> Self:
        self.vae.to(device)
        return super().to(device)

    def prepare(self, inputs: Any) -> dict[str, Prepared]:
        """As of every pipeline; prompts may come alone where there is nothing but text."""
        alone = tuple(self.encoder.encoders) == ("text",) and not isinstance(inputs, Mapping)
        return super().prepare({"text": inputs} if alone else inputs)

    def decode(self, z: Tensor) -> Tensor:
        """Latents `[B, C, S, S]` to images `[B, 3, 8 S, 8 S]` around [-1, 1], one at a time."""
        return torch.cat([decode(self.vae, part) for part in z.split(1)])

    @torch.no_grad()
    def encoded(self, images: Tensor) -> Tensor:
        """Images `[B, 3, 8 S, 8 S]` in [-1, 1] to latents `[B, C, S, S]`, one at a time."""
        return torch.cat([encode(self.vae, part) for part in images.split(1)])


def encode(vae: nn.Module, images: Tensor) -> Tensor:
    """Images to latents of unit size: the mean of the autoencoder's Gaussian."""
    mean = vae.encode(images.to(vae.dtype), return_dict=False)[0].mode()
    return ((mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).to(images.dtype)


def decode(vae: nn.Module, z: Tensor) -> Tensor:
    """Latents of unit size, as they are sampled, to images."""
    latents = z.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(latents, return_dict=False)[0].to(z.dtype)


def check_vae(vae: nn.Module, place: Path, channels: int) -> None:
    """Raises `UserError` for an autoencoder of other latents than a UNet's, or scaled in a way that is not known."""
    config = vae.config
    if config.latents_mean is not None or config.latents_std is not None:
        raise UserError(f"{place} has latents_mean or latents_std: this is not known here")
    if config.latent_channels != channels:
        raise UserError(f"{place} has latents of {config.latent_channels} channels, the UNet of {channels}")
    factors = config.scaling_factor, config.shift_factor or 0.0
    if not all(isinstance(factor, int | float) for factor in factors) or not config.scaling_factor:
        raise UserError(f"{place} has scaling_factor and shift_factor {factors}: give numbers, the first of them not 0")


def check_folder(folder: Path) -> dict[str, Any]:
    """The index of a folder all of whose parts are there and safe to read. Raises `UserError`."""
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} has no {INDEX}: give the folder of a diffusers pipeline")
    index = read_json(folder / INDEX)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(
            f"{folder} holds a {kind!r}: expected one of {', '.join(KINDS)}; others run in "
            "diffusers, and those with a UNet faster by semantica.accelerate(pipeline)"
        )
    refuse_code(read_json(folder / SCHEDULER), folder / SCHEDULER)
    for name in KINDS[kind]:
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or not (folder / name).is_dir():
            raise UserError(f"{folder} has no {name}, which a {kind} needs: download it whole")
        if name in CLASSES and entry[1] not in CLASSES[name]:
            raise UserError(f"{folder / INDEX} asks for {entry} as {name}: expected {', '.join(CLASSES[name])}")
    return index


def part_of(folder: Path, name: str) -> nn.Module:
    """A model of a folder in fp32, from safetensors. Raises `UserError` where there are none, or not all."""
    files = sorted(path.name for path in (folder / name).glob("*.safetensors*"))
    if not files:
        raise UserError(f"{folder / name} has no safetensors weights: other files are never read")
    refuse_code(read_json(folder / name / "config.json"), folder / name / "config.json")
    # a download may hold half precision alone
    half = {"variant": "fp16"} if all(".fp16." in file for file in files) else {}
    return load_model(CLASSES[name][0], folder / name, dtype=torch.float32, **half).eval().requires_grad_(False)


def pictures(folder: Path, tokens: bool = False, versatile: bool = False) -> ClipPictures:
    """The image encoder of a folder, with the normalisation of its feature extractor."""
    path = folder / f"{'image_' * versatile}feature_extractor" / "preprocessor_config.json"
    settings = read_json(path) if path.is_file() else {}
    mean, std = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
    for values in (mean, std):
        three = isinstance(values, list | tuple) and len(values) == 3
        if not three or not all(isinstance(value, int | float) for value in values):
            raise UserError(f"{path} has image_mean or image_std {values!r}: give three numbers each")
    tower = part_of(folder, "image_encoder")
    return VersatilePictures(tower, mean, std) if versatile else ClipPictures(tower, tokens, mean, std)


def adapt(unet: nn.Module, path: Path, scale: float, folder: Path) -> ClipPictures:
    """Load an IP-Adapter into a UNet; returns the encoder of its pictures. Raises `UserError`."""
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(f"{path} is no safetensors file: give the weights of an IP-Adapter")
    places = [place for place in (folder, path.parent) if (place / "image_encoder" / "config.json").is_file()]
    if not places:
        raise UserError(f"neither {folder} nor {path.parent} has the image_encoder that the IP-Adapter reads")
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, value in load_file(path).items():
        part, _, key = name.partition(".")
        if part not in state:
            raise UserError(f"{path} holds {name!r}: that is no IP-Adapter")
        state[part][key] = value
    if any("lora" in key for key in state["ip_adapter"]):
        raise UserError(f"{path} has LoRAs beside it, as those that read faces: only adapters of CLIP's pictures fit")
    try:
        with quiet():
            # what `load_ip_adapter` of diffusers' pipelines calls
            unet._load_ip_adapter_weights([state])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit this UNet ({first_line(error)}): an adapter of another model?") from error
    for module in unet.modules():
        if hasattr(module, "to_k_ip"):
            module.scale = [scale]
    unet.eval().requires_grad_(False)
    encoder = pictures(places[0], tokens="proj.weight" not in state["image_proj"])
    seen = encoder.blank().tokens
    try:
        unet.encoder_hid_proj([seen[:, None] if encoder.tokens else seen])
    except RuntimeError as error:
        place = places[0] / "image_encoder"
        raise UserError(f"{path} reads another image encoder than {place} ({first_line(error)})") from error
    return encoder


@torch.no_grad()
def blank(encoder: ClipTexts | ClipPictures, index: Mapping[str, Any]) -> Stream:
    """The stream of the unconditional branch: the empty prompt, or zeros where the model was trained with these."""
    if isinstance(encoder, ClipPictures):
        return encoder.blank()
    empty = encoder(encoder.prepare([""]))
    # the default of SDXL's pipeline; the other has no such option
    zeros = index.get("force_zeros_for_empty_prompt", index["_class_name"] == "StableDiffusionXLPipeline")
    return empty.map(torch.zeros_like) if zeros else empty
