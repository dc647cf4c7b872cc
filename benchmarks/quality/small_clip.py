"""A small CLIP in transformers' format for drawn scenes: a stand-in, in minutes, where no published weights are."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semantica.benchmarks.quality.scenes import COLOURS, GROUNDS, PLURALS, SHAPES, SIDE
from semantica.files import written
from semantica.progress import phase
from semantica.segmentation.aggregator import cost_volume
from semantica.segmentation.segmenter import Segmenter
from semantica.segmentation.sizes import Sizes
from semantica.tokens import END, MERGES, SETTINGS, START, VOCABULARY, ClipTokenizer

# tokens of a text, with its start and end
LENGTH = 24
WORDS = (*SHAPES, *(PLURALS.get(shape, shape + "s") for shape in SHAPES), *COLOURS, *GROUNDS,
         "a", "an", "of", "on", "and", "two", "three", "left", "right", "above", "below", "photo")  # fmt: skip
PATCH, WIDTH, DEPTH, HEADS, JOINT = 4, 64, 4, 4, 64
# of an aggregator on its 8 x 8 tokens; and the weight of classes that most of every picture is of
SIZES = Sizes(hidden=32, guidance=32, window=4, decoder=(32, 16), raised=(32, 16), projected=(16, 8), padding=32)
PLAIN, IGNORED = 0.1, -100


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


def small_clip(vocabulary: int) -> nn.Module:
    """Drawn weights, larger than CLIP's own in the vision tower: places and attention are then told apart sooner."""
    from transformers import CLIPConfig, CLIPModel

    size = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
                projection_dim=JOINT)  # fmt: skip
    vision = dict(size, image_size=SIDE, patch_size=PATCH)
    text = dict(size, vocab_size=vocabulary, max_position_embeddings=LENGTH,
                bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1)  # fmt: skip
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=JOINT))
    tower = clip.vision_model
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.normal_(std=0.3)
        tower.embeddings.patch_embedding.weight.normal_(std=0.1)
        for layer in tower.encoder.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight.mul_(2.5)
    return clip


def write_clip(out: Path, seed: int) -> None:
    """An untrained one with its tokenizer and preprocessing, as transformers writes them. A function of the seed."""
    torch.manual_seed(seed)
    with written(out) as aside:
        aside.mkdir()
        write_tokenizer(aside)
        save(small_clip(len(ClipTokenizer(aside).numbers)), aside)
        (aside / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))


def save(clip: nn.Module, folder: Path) -> None:
    """Without the library's bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        clip.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def train_places(
    folder: Path, out: Path, pictures: Tensor, labels: Tensor, names: Sequence[str], template: str, seed: int,
    steps: int, batch: int = 32, rate: float = 3e-3,
) -> float:  # fmt: skip
    """Train both towers whole: each place of a picture is told which text is of its class, by cosines and a softmax.

    It stands for what published weights know from captions, which also say "cross" or "red" alone: a place is told its
    shape and its colour too. Of an aggregator nothing is used.

    Args:
        folder, out: of the CLIP, before and after. pictures: `[N, 3, S, S]` in [-1, 1]. labels: int64 `[N, S, S]`,
            numbers of the names.

    Returns:
        The mean loss of the last steps.
    """
    torch.manual_seed(seed)
    model = Segmenter.from_clip(folder, templates=(template,), sizes=SIZES).tune("all")
    grid, texts, rights = model.grid, [names, SHAPES, tuple(COLOURS)], []
    numbers = model.numbers([name for each in texts for name in each])
    for which, each in enumerate(texts):
        words = [name.split()[::-1][which - 1] if which and " " in name else name for name in names]
        rights.append(torch.tensor([each.index(word) if word in each else IGNORED for word in words]))
    # a place is of the class that most of its middle is of
    part = SIDE // grid
    middles = torch.stack([labels[:, i::part, j::part] for i in (1, 2) for j in (1, 2)]).mode(0).values
    weight = torch.tensor([PLAIN if name in GROUNDS else 1.0 for name in names])
    optimizer = torch.optim.AdamW(model.towers.parameters(), rate, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2), pct_start=0.1)
    losses = []
    with phase("towers", steps) as bar:
        for step in range(steps):
            chosen = torch.randint(len(pictures), (batch,))
            some, right = pictures[chosen], middles[chosen]
            if step % 2:
                some, right = some.flip(-1), right.flip(-1)
            cosines = cost_volume(model.dense(some).tokens, model.embed(numbers)[None])[:, :, 0]
            each = (cosines * model.towers.logit_scale.exp()).split([len(one) for one in texts], 1)
            loss = F.cross_entropy(each[0], right, weight)
            for scores, table in zip(each[1:], rights[1:], strict=True):
                loss = loss + F.cross_entropy(scores, table[right], ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
            losses.append(loss.item())
            bar.update()
            if (step + 1) % 100 == 0:
                print(f"towers: step {step + 1}  loss {sum(losses[-100:]) / 100:.4f}", flush=True)
    with written(out) as aside:
        aside.mkdir()
        for path in sorted(folder.iterdir()):
            if path.suffix != ".safetensors":
                (aside / path.name).write_bytes(path.read_bytes())
        save(model.towers, aside)
    return sum(losses[-50:]) / max(len(losses[-50:]), 1)
