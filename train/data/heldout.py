"""A fixed set of held-out pairs, each with a partner from another group."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from semantica.inputs import SINGLE
from semantica.model.conditioner import encode_one
from semantica.sight import Sight
from semantica.train.data.draws import Ref
from semantica.train.data.pairs import Pairs, Tokenizer
from semantica.train.data.source import Source
from semantica.train.objective import moved

PAIRS, BATCH = 256, 64


def held_out_batches(
    data: Source,
    seed: int,
    condition_size: int | None,
    image_size: int,
    device: torch.device,
    conditions: int = 1,
    encoder: nn.Module | None = None,
    tokenizers: Mapping[str, Tokenizer] | None = None,
    sight: Sight | None = None,
) -> list[dict]:
    """At most 256 pairs (one per held-out target picture) in batches of at most 64, centre crops, no flips.

    Each batch has `other [B]`: the place in the batch of a sample from another group. Noise levels are stratified
    over the whole set, and all is a function of the seed. Conditions are pictures, or streams where tokens are stored
    or where an encoder is given, which then runs once; `shown` are their pictures. With tokenizers texts condition
    too, or alone; words that it does not know are left out. What is made on the device waits on the host.
    """
    count = min(PAIRS, max(2, len(data)))
    pairs = Pairs(
        data, seed=seed, image_size=image_size, condition_size=condition_size, sight=sight,
        conditions=conditions, global_batch=count, drop=0.0, flip=False, crop=None, pixels=True,
        tokenizers={name: getattr(each, "lenient", each) for name, each in (tokenizers or {}).items()},
    )  # fmt: skip
    result = []
    for start in range(0, count, BATCH):
        indices = range(start, min(start + BATCH, count))
        batch = pairs.batch(indices, device)
        if encoder is not None and data.tokens is None:
            batch = encoded(encoder.to(device), batch)
        batch["other"] = partners(batch["group"])
        # gigabytes of large pictures, that a GPU would have to hold beside every step
        result.append(moved(batch, "cpu"))
    if encoder is not None:
        encoder.to("cpu")
    return result


@torch.no_grad()
def encoded(encoder: nn.Module, batch: dict) -> dict:
    """A batch whose condition pictures are a stream, and `shown`."""
    condition = batch["condition"]
    shown = condition[SINGLE] if isinstance(condition, dict) else condition
    made = encode_one(encoder, shown)
    return {**batch, "shown": shown, "condition": {**condition, SINGLE: made} if isinstance(condition, dict) else made}


def examples(pairs: Pairs, count: int) -> dict:
    """The first samples of a run with their conditions' pictures, for when nothing is held out."""
    pairs = copy.copy(pairs)
    # texts alone have no pictures to show
    pairs.pixels = pairs.conditions > 0
    return pairs.batch(range(count))


def partners(groups: list[Ref]) -> torch.Tensor:
    """For each sample the next one, going round, of another group; itself where all are of one."""
    count = len(groups)
    places = []
    for i in range(count):
        ahead = ((i + step) % count for step in range(1, count))
        places.append(next((j for j in ahead if groups[j] != groups[i]), i))
    return torch.tensor(places)


def contrasted(batches: list[dict]) -> bool:
    """Whether held-out samples have partners of other groups, and so a figure with a wrong condition."""
    return any(len({*batch["group"]}) > 1 for batch in batches)
