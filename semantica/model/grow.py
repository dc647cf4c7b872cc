"""A trained network with further condition streams: each adds exactly nothing until it is trained."""

import re

import torch

from semantica.errors import UserError
from semantica.model.uvit import UViT

# what a block has for each stream, by the stream's place
PLACED = re.compile(r"(.*\.cross\.(?:to_kv|norm_k))\.(\d+)\.(.*)")


def new_streams(unet: UViT, other: UViT) -> tuple[str, ...]:
    """Streams of a network that another one lacks, whose weights it is to begin with.

    Raises:
        UserError: the other has a stream that this one lacks, or takes none in common with others.
    """
    lost = [name for name in other.stream_names if name not in unet.stream_names]
    if lost:
        raise UserError(f"it is conditioned on {lost[0]}, this run is not: a stream can be added, not taken away")
    new = tuple(name for name in unet.stream_names if name not in other.stream_names)
    if new and unet.use_tokens and unet.config.fusion != "parallel":
        raise UserError("concatenated streams share one softmax: a new one would change what is trained; take parallel")
    return new


@torch.no_grad()
def grow(unet: UViT, other: UViT) -> tuple[str, ...]:
    """Give a network the weights of one that has fewer streams; returns the names of new ones.

    What a new stream adds begins at zero (arXiv 2409.13346: a zero-initialised adapter of the vision encoder): its
    values are 0, so that its own softmax sums to exactly 0, and so is its pooled vector's share of the embedding. Keys
    and the normalisation of tokens begin as they do in any network. Results are the other's to the bit where its
    streams keep their order, in which they are added up.

    Raises:
        UserError: as `new_streams`; the networks differ in more than streams.
    """
    new, given = new_streams(unet, other), other.state_dict()
    filled = {}
    for key, value in unet.state_dict().items():
        placed = PLACED.fullmatch(key)
        source = key
        if placed:
            name = unet.stream_names[int(placed[2])]
            source = None if name in new else f"{placed[1]}.{other.stream_names.index(name)}.{placed[3]}"
        elif key.split(".")[0] in ("null_tokens", "norm_tokens", "pooled") and key.split(".")[1] in new:
            source = None
        filled[key] = value if source is None else given[source]
    unet.load_state_dict(filled)
    for name in new:
        if unet.use_tokens:
            for block in unet.transformer_blocks:
                # keys, then values
                block.cross.to_kv[unet.stream_names.index(name)].weight[unet.config.width :] = 0
        if unet.use_global:
            for parameter in unet.pooled[name][-1].parameters():
                parameter.zero_()
    return new
