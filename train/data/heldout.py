"""A fixed set of held-out pairs, each with a partner from another group."""

import copy

import torch
from torch import nn

from semantica.model.conditioner import encode_one
from semantica.train.data.draws import Ref
from semantica.train.data.pairs import Pairs
from semantica.train.data.source import Source

PAIRS, BATCH = 256, 64


def held_out_batches(
    data: Source,
    seed: int,
    condition_size: int,
    image_size: int,
    device: torch.device,
    conditions: int = 1,
    encoder: nn.Module | None = None,
) -> list[dict]:
    """At most 256 pairs (one per held-out target picture) in batches of at most 64, centre crops, no flips.

    Each batch has `other [B]`: the place in the batch of a sample from another group. Noise levels are stratified
    over the whole set, and all is a function of the seed. Conditions are pictures, or streams where tokens are stored
    or where an encoder is given, which then runs once; `shown` are their pictures.
    """
    count = min(PAIRS, max(2, len(data)))
    pairs = Pairs(
        data, seed=seed, image_size=image_size, condition_size=condition_size,
        conditions=conditions, global_batch=count, drop=0.0, flip=False, crop=None, pixels=True,
    )  # fmt: skip
    result = []
    for start in range(0, count, BATCH):
        indices = range(start, min(start + BATCH, count))
        batch = pairs.batch(indices, device)
        batch["group"] = [data.draw(seed, i).group for i in indices]
        batch["other"] = partners(batch["group"], data.mode).to(device)
        result.append(batch)
    if encoder is not None and data.tokens is None:
        encoder.to(device)
        with torch.no_grad():
            for batch in result:
                batch["shown"], batch["condition"] = batch["condition"], encode_one(encoder, batch["condition"])
        encoder.to("cpu")
    return result


def examples(pairs: Pairs, count: int) -> dict:
    """The first samples of a run with their conditions' pictures, for when nothing is held out."""
    pairs = copy.copy(pairs)
    pairs.pixels = True
    return pairs.batch(range(count))


def partners(groups: list[Ref], mode: str) -> torch.Tensor:
    """For each sample the next one, going round, of another group (of any other sample, in mode "reconstruct")."""
    count = len(groups)
    places = []
    for i in range(count):
        ahead = [(i + step) % count for step in range(1, count)]
        others = [j for j in ahead if mode == "reconstruct" or groups[j] != groups[i]]
        places.append(others[0] if others else i)
    return torch.tensor(places)
