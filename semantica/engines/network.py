"""The network itself in PyTorch, built from a bundle's configuration and weights, in the bundle's precision."""

from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor

from semantica.condition import Condition
from semantica.device import current, pick_device
from semantica.engines.base import Engine
from semantica.engines.bundle import WEIGHTS, Bundle
from semantica.errors import UserError
from semantica.inputs import samples_in
from semantica.model.attention import sampling_attention
from semantica.model.conditioner import encode, from_plain, placed
from semantica.model.uvit import UViT

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load(bundle: Bundle, backend: str, device: str) -> "TorchEngine":
    return TorchEngine(bundle, pick_device(device))


def build(bundle: Bundle, device: torch.device) -> tuple[UViT, torch.nn.Module]:
    """The two networks of a bundle with its weights. Raises `UserError` where configuration and weights disagree, or
    the bundle is quantised, which its graphs alone are.
    """
    if bundle.quantised:
        raise UserError(
            f"{bundle.folder} is {bundle.quantised}, which its graphs are and the network is not: use --engine "
            "onnxruntime or an engine of TensorRT, or the bundle that it was made from"
        )
    model = bundle.manifest["model"]
    weights = load_file(bundle.folder / WEIGHTS)
    settings = dict(model.get("unet") or {})
    kind = settings.pop("class", None)
    if kind == "UNet2DConditionModel":
        raise UserError(f"{bundle.folder} holds a UNet of diffusers: in torch, sample the folder that it came from")
    if kind != UViT.__name__:
        raise UserError(f"{bundle.folder} asks for other code as its unet: it is never loaded")
    made = UViT.from_config(settings), from_plain(model.get("encoder"), bundle.folder)
    for name, module in zip(("unet", "encoder"), made):
        torch.nn.Module.to(module.eval().requires_grad_(False), DTYPES[bundle.precision])
        part = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        try:
            module.load_state_dict(part)
        except RuntimeError as error:
            raise UserError(f"{bundle.folder}: its weights do not fit its {name}: export the bundle again") from error
        torch.nn.Module.to(module, device)
    return made


class TorchEngine(Engine):
    """Eager PyTorch: every operator of this package, on the CPU or a GPU."""

    backend, array = "torch", "torch"
    refuses = {"gradients": "engine 'torch' gives no gradients: sample the run folder that it was exported from"}

    def __init__(self, bundle: Bundle, device: torch.device):
        super().__init__(bundle)
        self.device, self.place = str(device), device
        self.arithmetic = bundle.precision
        self.unet, self.encoder = build(bundle, device)
        self.unet.to(memory_format=torch.channels_last)
        sampling_attention(self.unet, device, self.unet.dtype)

    def check(self, name: str, array: Tensor, batch: int) -> None:
        # an embedding may be one for each block, see `UViT.forward`
        super().check(name, array[:, 0] if name == "emb" and array.ndim == 3 else array, batch)

    @torch.inference_mode()
    def encode(self, inputs: Mapping[str, Tensor]) -> Condition:
        inputs = placed(inputs, self.unet.device, self.unet.dtype)
        with current(self.place):
            condition = self.unet.condition(encode(self.encoder, self.unet.stream_names, inputs))
        # without any condition there is one embedding for all
        return condition if self.unet.stream_names else condition.repeat(samples_in(inputs))

    @torch.inference_mode()
    def null(self, batch: int) -> Condition:
        with current(self.place):
            return self.unet.null(batch).fill(self.bundle.sizes)

    @torch.inference_mode()
    def embedding(self, logsnr: Tensor) -> Tensor:
        """See `semantica.sampling.loop.Denoiser`."""
        with current(self.place):
            return self.unet.embedding(logsnr)

    def first_blocks(self, count: int) -> tuple[bool, ...]:
        """See `UViT.first_blocks`."""
        return self.unet.first_blocks(count)

    @property
    def module(self) -> UViT:
        """What guiders may change."""
        return self.unet

    @torch.inference_mode()
    def predict(self, z: Tensor, logsnr: Tensor, inputs: Condition) -> Tensor:
        with current(self.place):
            return self.unet(z, logsnr, inputs)
