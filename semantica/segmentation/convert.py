"""`semantica convert-segmenter`: the authors' weights of CAT-Seg as a segmenter of this package.

They are a pickle. It is read by torch's loader of tensors alone, which knows no other classes and calls no code, and
whatever of it is no tensor is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantica.errors import UserError, first_line
from semantica.files import written
from semantica.segmentation.sizes import Sizes
from semantica.tokens import ClipTokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from semantica.segmentation.segmenter import Segmenter

# names of the authors' weights -> ours, in the order in which they are tried; the rest of a name stays
CLIP, OWN = "sem_seg_head.predictor.clip_model.", "sem_seg_head.predictor.transformer."
LAYER = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "attn.q_proj_weight": "self_attn.q_proj.weight",
    "attn.k_proj_weight": "self_attn.k_proj.weight",
    "attn.v_proj_weight": "self_attn.v_proj.weight",
}
TOWERS = {
    "logit_scale": "towers.logit_scale",
    "visual.class_embedding": "towers.vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "towers.vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "towers.vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "towers.vision_model.pre_layrnorm.",
    "visual.ln_post.": "towers.vision_model.post_layernorm.",
    "token_embedding.weight": "towers.text_model.embeddings.token_embedding.weight",
    "positional_embedding": "towers.text_model.embeddings.position_embedding.weight",
    "ln_final.": "towers.text_model.final_layer_norm.",
}
PROJECTIONS = {"visual.proj": "towers.visual_projection.weight", "text_projection": "towers.text_projection.weight"}
SPATIAL = {
    "guidance_norm.": "norm.",
    "block_1.": "blocks.0.",
    "block_2.": "blocks.1.",
}
BLOCK = {"attn.": "attention.", "mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.2."}
CLASSES = {
    "attention.q.": "q.",
    "attention.k.": "k.",
    "attention.v.": "v.",
    "MLP.": "mlp.",
    "padding_tokens": "padding_token",
    "padding_guidance": "padding_guide",
}
UP = {
    "conv.double_conv.0.": "conv1.",
    "conv.double_conv.1.": "norm1.",
    "conv.double_conv.3.": "conv2.",
    "conv.double_conv.4.": "norm2.",
}
PARTS = {
    "conv1.": "embed.",
    "guidance_projection.": "visual.",
    "text_guidance_projection.": "textual.",
    "decoder1.": "decoder.0.",
    "decoder2.": "decoder.1.",
    "decoder_guidance_projection.0.0.": "details.0.1.",
    "decoder_guidance_projection.1.0.": "details.1.1.",
    "head.": "head.",
}
UPSAMPLED = {"upsample1.": "aggregator.details.0.0.", "upsample2.": "aggregator.details.1.0."}
# constants that both sides make themselves
MADE = re.compile(r"attn_mask$|position_ids$|^(clip_)?pixel_(mean|std)$")


@dataclass(frozen=True)
class ConvertConfig:
    """Turn the authors' weights of CAT-Seg (model_base.pth, model_large.pth) into a folder that `semantica segment`
    reads. The file is a pickle: only tensors are read from it, and a file that holds anything else is refused.
    """

    weights: Path
    """The .pth file."""
    tokenizer: Path
    """Folder with CLIP's tokenizer: vocab.json, merges.txt and tokenizer_config.json."""
    out: Path
    """Folder to write; it must not exist."""


def renamed(name: str, *tables: Mapping[str, str]) -> str:
    """A name whose beginning is replaced, by one table after another; the first row of each that fits."""
    done = ""
    for table in tables:
        for old, new in table.items():
            if name.startswith(old):
                done, name = done + new, name[len(old) :]
                break
    return done + name


def ours(name: str, tensor: "Tensor") -> "dict[str, Tensor]":
    """One of the authors' weights under our names: three for a bias that they have in one, none for a constant."""
    if MADE.search(name):
        return {}
    if name.startswith(CLIP):
        name = name.removeprefix(CLIP)
        if name in PROJECTIONS:
            return {PROJECTIONS[name]: tensor.T}
        if found := re.match(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.*)", name):
            tower = "vision" if found[1] else "text"
            layer = f"towers.{tower}_model.encoder.layers.{found[2]}."
            if found[3].startswith("attn.in_proj_"):
                kind = found[3].removeprefix("attn.in_proj_")
                return {f"{layer}self_attn.{part}_proj.{kind}": t for part, t in zip("qkv", tensor.chunk(3))}
            return {layer + renamed(found[3], LAYER): tensor}
        return {renamed(name, TOWERS): tensor}
    if name.startswith(OWN):
        name = name.removeprefix(OWN)
        if found := re.match(r"layers\.(\d+)\.swin_block\.(.*)", name):
            return {f"aggregator.spatial.{found[1]}." + renamed(found[2], SPATIAL, BLOCK): tensor}
        if found := re.match(r"layers\.(\d+)\.attention\.(.*)", name):
            flat = tensor.flatten() if found[2].startswith("padding_") else tensor
            return {f"aggregator.classes.{found[1]}." + renamed(found[2], CLASSES): flat}
        within = UP if name.startswith(("decoder1.", "decoder2.")) else {}
        return {"aggregator." + renamed(name, PARTS, within): tensor}
    return {renamed(name, UPSAMPLED): tensor}


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Weights by name from a checkpoint of the authors' framework, `{"model": {name: tensor}, ...}`, or that alone.

    Raises:
        UserError: it is missing, or holds anything that torch's loader of tensors does not know, which it does not run.
    """
    import torch

    if not path.is_file():
        raise UserError(f"{path} is no file: give the authors' model_base.pth or model_large.pth")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # each thing that can be wrong with a file has an error of its own
    except Exception as error:
        why = first_line(error)
        raise UserError(f"{path} is refused: it holds more than tensors, or is no checkpoint ({why})") from error
    weights = held.get("model", held) if isinstance(held, dict) else held
    pairs = weights.items() if isinstance(weights, dict) else ()
    if not pairs or not all(isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in pairs):
        raise UserError(f"{path} is refused: its weights are not a table of tensors by name")
    return weights


def settings_of(weights: "Mapping[str, Tensor]") -> dict[str, Any]:
    """What a `Segmenter` is made with, as the shapes of our weights say; CLIP's heads are 64 wide.

    Raises:
        UserError: a weight is missing that says so.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise UserError(f"these are no weights of CAT-Seg with a CLIP of transformers: {name} is not among them")
        return tuple(weights[name].shape)

    def count(start: str) -> int:
        return len({name[len(start) :].split(".")[0] for name in weights if name.startswith(start)})

    vision, text = "towers.vision_model.", "towers.text_model."
    width, _, patch, _ = shape(f"{vision}embeddings.patch_embedding.weight")
    places, _ = shape(f"{vision}embeddings.position_embedding.weight")
    words, text_width = shape(f"{text}embeddings.token_embedding.weight")
    length, _ = shape(f"{text}embeddings.position_embedding.weight")
    joint, _ = shape("towers.visual_projection.weight")
    layers = count(f"{vision}encoder.layers.")
    tower = {"hidden_act": "quick_gelu", "projection_dim": joint}
    clip = {
        "model_type": "clip",
        "projection_dim": joint,
        "vision_config": tower | {
            "hidden_size": width, "intermediate_size": shape(f"{vision}encoder.layers.0.mlp.fc1.weight")[0],
            "num_hidden_layers": layers, "num_attention_heads": width // 64, "patch_size": patch,
            "image_size": round((places - 1) ** 0.5) * patch,
        },
        "text_config": tower | {
            "hidden_size": text_width, "intermediate_size": shape(f"{text}encoder.layers.0.mlp.fc1.weight")[0],
            "num_hidden_layers": count(f"{text}encoder.layers."), "num_attention_heads": text_width // 64,
            "vocab_size": words, "max_position_embeddings": length, "bos_token_id": words - 2,
            "eos_token_id": words - 1,
        },
    }  # fmt: skip
    hidden, templates, _, _ = shape("aggregator.embed.weight")
    details = [shape(f"aggregator.details.{i}.1.weight") for i in range(2)]
    sizes = Sizes(
        hidden=hidden,
        layers=count("aggregator.spatial."),
        guidance=shape("aggregator.visual.0.weight")[0],
        decoder=tuple(shape(f"aggregator.decoder.{i}.conv2.weight")[0] for i in range(2)),
        raised=tuple(each[1] for each in details),
        projected=tuple(each[0] for each in details),
    )
    if templates != 1:
        raise UserError(
            f"the cost volume has {templates} templates: only weights with the authors' single one are known"
        )
    return {"clip": clip, "image_size": 24 * patch, "details": (layers // 3 - 1, 2 * layers // 3 - 1),
            "sizes": asdict(sizes)}  # fmt: skip


def converted(weights: "Mapping[str, Tensor]", source: str) -> "Segmenter":
    """A segmenter of the authors' weights, without its tokenizer.

    Raises:
        UserError: a weight is missing, of another shape, or not known.
    """
    from semantica.segmentation.segmenter import Segmenter

    found = {new: t.float() for name, tensor in weights.items() for new, t in ours(name, tensor).items()}
    made = Segmenter(source, **settings_of(found))
    expected = {name: tensor.shape for name, tensor in made.state_dict().items()}
    for name in sorted({*found, *expected}):
        if name not in found or name not in expected:
            raise UserError(f"{source} {'has an unknown' if name in found else 'lacks the'} weight {name}: it is of "
                            "another model")  # fmt: skip
        if found[name].shape != expected[name]:
            raise UserError(f"{source}: {name} is {list(found[name].shape)}, expected {list(expected[name])}")
    made.load_state_dict(found)
    return made.eval()


def convert(config: ConvertConfig) -> None:
    """Write the folder. Raises `UserError` where it exists, or weights or tokenizer cannot be used."""
    if config.out.exists():
        raise UserError(f"{config.out} exists: give another folder")
    if not config.out.parent.is_dir():
        raise UserError(f"{config.out} cannot be written: {config.out.parent} is not a folder")
    weights, tokenizer = read_tensors(config.weights), ClipTokenizer(config.tokenizer)
    segmenter = converted(weights, config.weights.name)
    text = segmenter.towers.config.text_config
    if max(tokenizer.numbers) >= text.vocab_size or tokenizer.length > text.max_position_embeddings:
        raise UserError(
            f"{config.tokenizer} has more words or longer texts than {config.weights} knows: give CLIP's own"
        )
    segmenter.tokenizer = tokenizer
    with written(config.out, "refuse") as aside:
        segmenter.save_pretrained(aside)
    print(f'{config.out}: semantica segment --model {config.out} --image FILE --classes "..."')
