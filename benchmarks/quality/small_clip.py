"""A small CLIP that is trained whole on drawn scenes and their captions: towers for what needs some, in minutes."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from semantica.benchmarks.quality.scenes import COLOURS, GROUNDS, PLURALS, SHAPES, SIDE, picture_of, scene_of
from semantica.files import written
from semantica.images import to_tensor
from semantica.tokens import END, MERGES, SETTINGS, START, VOCABULARY, ClipTokenizer

# tokens of the longest caption, and its start and end
LENGTH = 24
WORDS = (*SHAPES, *(PLURALS.get(shape, shape + "s") for shape in SHAPES), *COLOURS, *GROUNDS,
         "a", "an", "of", "on", "and", "two", "three", "left", "right", "above", "below", "photo")  # fmt: skip
PATCH, WIDTH, DEPTH, HEADS, JOINT = 4, 96, 4, 4, 64


def write_tokenizer(folder: Path) -> None:
    """CLIP's two files, with a token for each word of the captions, and for each byte of any other."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts[:2] = [parts[0] + parts[1]]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges), START, END]
    (folder / VOCABULARY).write_text(json.dumps({word: i for i, word in enumerate(dict.fromkeys(words))}))
    (folder / MERGES).write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    (folder / SETTINGS).write_text(json.dumps({"model_max_length": LENGTH}))


def small_clip(vocabulary: int) -> torch.nn.Module:
    """Without training."""
    from transformers import CLIPConfig, CLIPModel

    size = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
                projection_dim=JOINT)  # fmt: skip
    vision = dict(size, image_size=SIDE, patch_size=PATCH)
    text = dict(size, vocab_size=vocabulary, max_position_embeddings=LENGTH,
                bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1)  # fmt: skip
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=JOINT))


def train_clip(out: Path, seed: int, steps: int, batch: int = 128, rate: float = 1e-3) -> list[float]:
    """Contrastive training on scenes of no held-out crossing (Radford et al., arXiv 2103.00020), written to `out` as
    transformers writes a CLIP; returns the loss of each step."""
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    losses = []
    with written(out) as aside:
        aside.mkdir()
        write_tokenizer(aside)
        tokenizer = ClipTokenizer(aside)
        clip = small_clip(len(tokenizer.numbers))
        optimizer = torch.optim.AdamW(clip.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.05)
        plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2), pct_start=0.1)
        for step in range(steps):
            numbers = range(step * batch, (step + 1) * batch)
            pixels = to_tensor(np.stack([picture_of("train", seed, n) for n in numbers]))
            texts = torch.from_numpy(tokenizer([scene_of("train", seed, n).caption for n in numbers]))
            made = clip(input_ids=texts, pixel_values=pixels)
            # equal captions are no mistake of each other
            same = (texts[:, None] == texts).all(-1).float()
            goal = same / same.sum(1, keepdim=True)
            loss = (F.cross_entropy(made.logits_per_text, goal) + F.cross_entropy(made.logits_per_image, goal)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
            losses.append(loss.item())
        clip.save_pretrained(aside)
        (aside / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return losses
