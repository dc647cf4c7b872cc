"""Whole pipelines of diffusers on tiny drawn models: the same seed gives the same pictures, accelerated or not."""

import string

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import semantica
from semantica.fused.parts import parts
from semantica.fused.processors import FusedIPAdapterAttnProcessor
from semantica.fused.published import Adapter, adapter_weights

WIDTH = 24
BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
UNET = BLOCKS | {
    "sample_size": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": (1, 2),
}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
    "cross_attention_dim": 2 * WIDTH,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
}
VAE = BLOCKS | {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "sample_size": 32,
}
CLIP = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def tokenizer() -> CLIPTokenizer:
    letters = string.ascii_lowercase
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def drawn(model: nn.Module) -> nn.Module:
    """Norms whose weights are not 1 and 0, and no output that starts at 0."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    for block in (*getattr(model, "controlnet_down_blocks", ()), getattr(model, "controlnet_mid_block", None)):
        if block is not None:
            nn.init.normal_(block.weight, std=0.1)
    return model.eval()


def text(kind=CLIPTextModel) -> nn.Module:
    config = CLIPTextConfig(vocab_size=54, bos_token_id=52, eos_token_id=53, projection_dim=WIDTH, **CLIP)
    return kind(config).eval()


def vision() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=WIDTH, **CLIP))


def shared(**changes) -> dict:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)  # fmt: skip
    return {
        "unet": drawn(UNet2DConditionModel(**UNET | changes)),
        "vae": drawn(AutoencoderKL(**VAE)),
        "scheduler": scheduler,
    }


def worded(**changes) -> dict:
    return shared(**changes) | {"text_encoder": text(), "tokenizer": tokenizer(), "safety_checker": None,
                                "feature_extractor": None, "requires_safety_checker": False}  # fmt: skip


def picture(seed: int = 0, size: int = 32) -> Image.Image:
    pixels = torch.randint(0, 256, (size, size, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


PROMPT = {"prompt": "a red cat", "negative_prompt": "blue", "guidance_scale": 5.0}


def plain():
    return StableDiffusionPipeline(**worded()), PROMPT


def xl():
    parts_ = shared(**XL) | {
        "text_encoder": text(),
        "text_encoder_2": text(CLIPTextModelWithProjection),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
    }
    return StableDiffusionXLPipeline(**parts_), PROMPT


def variation():
    parts_ = shared() | {"image_encoder": vision(), "safety_checker": None, "requires_safety_checker": False}
    parts_["feature_extractor"] = CLIPImageProcessor(crop_size=28, size=28)
    return StableDiffusionImageVariationPipeline(**parts_), {"image": picture(), "guidance_scale": 3.0}


def adapted():
    pipe = StableDiffusionPipeline(**worded() | {"image_encoder": vision()})
    pipe.register_modules(feature_extractor=CLIPImageProcessor(crop_size=28, size=28))
    adapters = [adapter_weights(pipe.unet, Adapter(4, WIDTH), seed) for seed in (1, 2)]
    pipe.load_ip_adapter(adapters, subfolder="", weight_name=["", ""], image_encoder_folder=None)
    # one adapter, another in some blocks only
    pipe.set_ip_adapter_scale([0.7, {"down": {"block_1": [0.0]}, "up": {"block_0": [0.4, 0.9]}}])
    return pipe, PROMPT | {"ip_adapter_image": [picture(1), picture(2)]}


def img2img():
    return StableDiffusionImg2ImgPipeline(**worded()), PROMPT | {"image": picture(), "strength": 0.7}


def inpaint():
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    given = {"image": picture(), "mask_image": mask, "height": 32, "width": 32}
    return StableDiffusionInpaintPipeline(**worded(in_channels=9)), PROMPT | given


def control():
    config = {name: value for name, value in UNET.items() if name not in ("up_block_types", "sample_size")}
    net = drawn(ControlNetModel(**config, conditioning_embedding_out_channels=(8, 16)))
    return StableDiffusionControlNetPipeline(**worded(), controlnet=net), PROMPT | {"image": picture()}


def freeu():
    pipe, given = plain()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return pipe, given


def tiled():
    pipe, given = plain()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8
    return pipe, given | {"num_images_per_prompt": 2}


PIPELINES = {
    "text to image": plain, "XL": xl, "image variation": variation, "IP-Adapters": adapted, "image to image": img2img,
    "inpainting": inpaint, "ControlNet": control, "FreeU": freeu, "tiles and slices": tiled,
}  # fmt: skip


def pictures(pipe, given: dict, seed: int = 3) -> torch.Tensor:
    """`[B, 3, H, W]` in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(seed)}
    return pipe(**given, **steps).images


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    torch.manual_seed(0)
    return PIPELINES[request.param]()


def test_the_same_pictures(pipeline):
    pipe, given = pipeline
    stock, other = pictures(pipe, given), pictures(pipe, given, seed=4)
    assert stock.std() > 0.01 and (stock - other).abs().max() > 0.01
    assert semantica.accelerate(pipe) is pipe
    assert all(part.fused for part in parts(pipe)) and len({part.name.split(".")[0] for part in parts(pipe)}) >= 2
    assert (pictures(pipe, given) - stock).abs().max() < 1e-3
    assert torch.equal(pictures(semantica.restore(pipe), given), stock)


def test_what_is_turned_on_later_works_too():
    torch.manual_seed(0)
    pipe, given = plain()
    semantica.accelerate(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8
    fused = pictures(pipe, given)
    assert (pictures(semantica.restore(pipe), given) - fused).abs().max() < 1e-3
    adapter = adapter_weights(pipe.unet, Adapter(4, WIDTH))
    pipe.register_modules(image_encoder=vision(), feature_extractor=CLIPImageProcessor(crop_size=28, size=28))
    semantica.accelerate(pipe).load_ip_adapter(adapter, subfolder="", weight_name="", image_encoder_folder=None)
    # the processors that came are diffusers' own until they are asked for
    stock = pictures(pipe, given | {"ip_adapter_image": picture(1)})
    semantica.accelerate(pipe)
    assert sum(type(p) is FusedIPAdapterAttnProcessor for p in pipe.unet.attn_processors.values()) == 4
    assert (pictures(pipe, given | {"ip_adapter_image": picture(1)}) - stock).abs().max() < 1e-3
    pipe.unload_ip_adapter()
    assert (pictures(pipe, given) - fused).abs().max() < 1e-3


def test_a_saved_pipeline_is_plain_diffusers_and_has_the_same_bits(tmp_path):
    torch.manual_seed(0)
    pipe, given = plain()
    semantica.accelerate(pipe).save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    for name in ("unet", "vae"):
        ours, theirs = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(pictures(again, given), pictures(semantica.restore(pipe), given))
