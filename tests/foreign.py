"""Folders of diffusers' pipelines with small random weights, in the shapes of public models."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TEXT, PICTURE, SIZE, LENGTH = 32, 24, 8, 12
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
            "steps_offset": 1, "set_alpha_to_one": False}  # fmt: skip
UNET = {
    "sample_size": SIZE, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": TEXT,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": (2, 4),
}  # fmt: skip
XL = {
    "cross_attention_dim": 2 * TEXT, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 16, "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "block_out_channels": (16, 16, 16, 16), "norm_num_groups": 8, "latent_channels": 4, "sample_size": 8 * SIZE,
}  # fmt: skip
ALL = {"attention_dropout": 0.0, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CLASSES = {
    "sd": ("StableDiffusionPipeline", ("text_encoder", "tokenizer")),
    "xl": ("StableDiffusionXLPipeline", ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    "variations": ("StableDiffusionImageVariationPipeline", ("image_encoder",)),
    "versatile": ("VersatileDiffusionImageVariationPipeline", ("image_encoder",)),
}
TRAINED_ON = ["a lighthouse on a cliff at dusk, oil on canvas", "two red bicycles, photograph of 1987!"] * 3


def tokenizer(folder: Path) -> Path:
    """Byte pairs learned from a few words, in CLIP's two files."""
    made = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    made.train_from_iterator(TRAINED_ON, trainer)
    merges = json.loads(made.to_str())["model"]["merges"]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(dict.fromkeys(words))}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LENGTH}))
    return folder


def texts(kind: type, vocabulary: int) -> torch.nn.Module:
    config = CLIPTextConfig(vocab_size=vocabulary, hidden_size=TEXT, projection_dim=16, max_position_embeddings=LENGTH,
                            bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, **ALL)  # fmt: skip
    return kind(config)


def write(folder: Path, kind: str, vae: dict | None = None, **unet) -> Path:
    """A pipeline's folder; `kind`: of `CLASSES`. With an IP-Adapter beside it for "sd"."""
    torch.manual_seed(0)
    vae = VAE | (vae or {})
    levels = len(vae["block_out_channels"])
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    name, own = CLASSES[kind]
    made = {"unet": UNet2DConditionModel(**UNET | (XL if kind == "xl" else {}) | unet), "vae": AutoencoderKL(**vae),
            "scheduler": DDIMScheduler(**SCHEDULE)}  # fmt: skip
    for module in made["unet"].modules():
        # fresh weights hardly look at the condition
        if getattr(module, "is_cross_attention", False):
            for part in (module.to_q, module.to_k, module.to_v):
                part.weight.data.mul_(4)
    for part in own:
        if part.startswith("tokenizer"):
            tokenizer(folder / part)
    vocabulary = len(json.loads((folder / "tokenizer/vocab.json").read_text())) if "tokenizer" in own else 0
    if "text_encoder" in own:
        made["text_encoder"] = texts(CLIPTextModel, vocabulary)
    if "text_encoder_2" in own:
        made["text_encoder_2"] = texts(CLIPTextModelWithProjection, vocabulary)
    width = PICTURE if kind == "sd" or kind == "xl" else TEXT
    pictures = CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=TEXT, projection_dim=width, image_size=32, patch_size=8, **ALL)
    )
    if "image_encoder" in own:
        made["image_encoder"] = pictures
    index = {"_class_name": name, "force_zeros_for_empty_prompt": kind == "xl"}
    if kind == "versatile":
        made["image_unet"] = made.pop("unet")
    for part, module in made.items():
        module.save_pretrained(folder / part)
        index[part] = ["transformers" if "encoder" in part else "diffusers", type(module).__name__]
    index |= {part: ["transformers", "CLIPTokenizer"] for part in own if part.startswith("tokenizer")}
    (folder / "model_index.json").write_text(json.dumps(index))
    if kind == "sd":
        pictures.save_pretrained(folder.with_name("ip") / "image_encoder")
        save_file(adapter(made["unet"]), folder.with_name("ip") / "ip.safetensors")
    return folder


def adapter(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """An IP-Adapter's weights as they are published."""
    state = {
        "image_proj.proj.weight": torch.randn(4 * TEXT, PICTURE) / 5,
        "image_proj.proj.bias": torch.zeros(4 * TEXT),
        "image_proj.norm.weight": torch.ones(TEXT),
        "image_proj.norm.bias": torch.zeros(TEXT),
    }
    crossing = [name for name in unet.attn_processors if "attn2" in name]
    for i, name in enumerate(crossing):
        width = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in "kv":
            state[f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(width, TEXT) / 5
    return state
