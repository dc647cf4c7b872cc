"""Pairs -> batches, where every random choice is a pure function of (seed, global sample index).

Sample `index` of a run is the same whichever process or worker makes it, and whether or not the run was interrupted.
"""

import itertools
import math
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from semantica.condition import Stream
from semantica.errors import UserError
from semantica.images import BadImage, fit, to_tensor
from semantica.train.data.draws import DROP, LEVEL, NOISE, Pair, Ref, View, generator, strata
from semantica.train.data.source import Source

# pictures found broken for one sample before the data is given up
PATIENCE = 64


class Pairs(Dataset):
    """Sample `index` (any non-negative integer) of a run, as a pure function of (data, options, seed, index).

    An item is a dict: `condition` uint8 `[C, C, 3]`, or `[K, C, C, 3]` for K > 1 conditions; `target` uint8
    `[S, S, 3]`; `noise` float32 `[3, S, S]`, standard normal; `u` float in (0, 1), the noise level's quantile,
    stratified so that each global batch has one in each interval `[k / global_batch, (k + 1) / global_batch)`; `drop`
    bool, whether the condition is dropped; `index`; `bad`, a list of (path, reason) of pictures that proved broken and
    were replaced by the next usable ones.

    Data with stored tokens have `tokens`, fp16 `[M, C]` for each condition, and `pooled`, fp16 `[C]` for each, instead
    of `condition`: those of its centre, mirrored where the picture would be.

    Args:
        image_size, condition_size: S and C in pixels; C defaults to S.
        conditions: K, pictures that each target is conditioned on.
        global_batch: samples per optimizer step, over all processes and micro-batches.
        drop: probability of dropping the condition.
        flip: mirror each picture with probability 1/2.
        crop: the smallest side of a random square crop, as a share of the shorter side (1: random place only);
            None takes the centre.
        pixels: give `condition` too where tokens are stored, to be looked at.
        target_tokens: give the stored tokens of the target too, `target_tokens` `[M, C]`.

    Raises:
        UserError: drop or crop out of range; a crop where the target has to be what its stored tokens show.
    """

    def __init__(
        self,
        data: Source,
        *,
        seed: int,
        image_size: int,
        condition_size: int | None = None,
        conditions: int = 1,
        global_batch: int,
        drop: float = 0.1,
        flip: bool = True,
        crop: float | None = 1.0,
        pixels: bool = False,
        target_tokens: bool = False,
    ):
        if not 0 <= drop <= 1:
            raise UserError(f"condition dropout {drop} is out of range: give a probability from 0 to 1")
        if crop is not None and not 0 < crop <= 1:
            raise UserError(f"crop {crop} is out of range: give a share of the picture above 0 and at most 1")
        if crop is not None and (target_tokens or (data.tokens and data.mode == "reconstruct")):
            raise UserError("stored tokens show the centre of a picture, and here the target's: give --crop centre")
        self.data = data
        self.seed = seed
        self.image_size = image_size
        self.condition_size = condition_size or image_size
        self.conditions = conditions
        self.global_batch = global_batch
        self.drop = drop
        self.flip = flip
        self.crop = crop
        self.pixels = pixels or data.tokens is None
        self.target_tokens = target_tokens

    def __len__(self) -> int:
        """Samples per epoch; indices run on past it."""
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises `UserError` when `PATIENCE` pictures, or all there are, prove broken before a pair is found."""
        bad: list[tuple[str, str]] = []
        pair, ((shown, target), *conditions) = self._load_pair(index, bad)
        batch, position = divmod(index, self.global_batch)
        # 32 bits at the middle of their cells: never 0 or 1, and exact when the stratum is added
        within = (int(generator(self.seed, LEVEL, batch, position).integers(2**32)) + 0.5) / 2**32
        shape = (3, self.image_size, self.image_size)
        inputs = {}
        if self.pixels:
            views = zip(conditions, pair.conditions)
            cuts = [self._cut(image, self.condition_size, view) for (_, image), view in views]
            inputs["condition"] = cuts[0] if self.conditions == 1 else np.stack(cuts)
        if self.data.tokens:
            views = zip(conditions, pair.conditions)
            stored = [self.data.tokens.read(ref, view.flip and self.flip) for (ref, _), view in views]
            inputs["tokens"], inputs["pooled"] = zip(*stored)
        if self.target_tokens:
            inputs["target_tokens"], _ = self.data.tokens.read(shown, pair.target.flip and self.flip)
        return {
            **inputs,
            "target": self._cut(target, self.image_size, pair.target),
            "noise": generator(self.seed, NOISE, index).standard_normal(shape, np.float32),
            "u": (int(strata(self.global_batch, self.seed, batch)[position]) + within) / self.global_batch,
            "drop": bool(generator(self.seed, DROP, index).random() < self.drop),
            "index": index,
            "bad": bad,
        }

    def prefetch(self, indices: Iterable[int]) -> None:
        """Let the data fetch what these samples will show, all at once."""
        if self.data.remote:
            draws = [self.data.draw(self.seed, index, self.conditions) for index in indices]
            views = [view for pair in draws for view in (pair.target, *(pair.conditions if self.pixels else ()))]
            self.data.prefetch({view.ref for view in views})

    def _load_pair(self, index: int, bad: list[tuple[str, str]]) -> tuple[Pair, list[tuple[Ref, Image.Image | None]]]:
        """A usable pair, and its pictures with their references: the target, then the conditions."""
        same, stored = self.data.mode == "reconstruct", self.data.tokens is not None
        # every picture is a target at least once in that span
        for later in range(index, index + 2 * len(self.data)):
            pair = self.data.draw(self.seed, later, self.conditions)
            candidates = self.data.target_candidates(pair.group, pair.target.ref)
            found = self._first_usable(candidates, bad, True, stored and (same or self.target_tokens))
            if found is None:
                continue
            if same:
                return pair, [found] * (1 + self.conditions)
            images, target = [found], found[0]
            for view in pair.conditions:
                candidates = self.data.condition_candidates(pair.group, target, view.ref)
                found = self._first_usable(candidates, bad, self.pixels, stored)
                if found is None:
                    break
                images.append(found)
            if len(images) == 1 + self.conditions:
                return pair, images
        raise self._give_up(bad)

    def _first_usable(
        self, candidates: Iterable[Ref], bad: list[tuple[str, str]], decode: bool, stored: bool
    ) -> tuple[Ref, Image.Image | None] | None:
        """The first of the pictures that decodes, and that has stored tokens, as far as these are asked for."""
        known = {name for name, _ in bad}
        for ref in candidates:
            name = self.data.name_of(ref)
            if name in known:
                continue
            try:
                if stored:
                    self.data.tokens.check(ref)
                return ref, self.data.load(ref, self._near) if decode else None
            except BadImage as error:
                bad.append((name, error.reason))
            if len(bad) >= PATIENCE:
                raise self._give_up(bad)
        return None

    def _give_up(self, bad: list[tuple[str, str]]) -> UserError:
        what = f"no readable pair after {len(bad)} broken pictures in {str(self.data.root)!r}"
        return UserError(f"{what}, the last is {bad[-1][0]!r} ({bad[-1][1]}): check the data")

    @property
    def _near(self) -> int:
        size = max(self.image_size, self.condition_size) if self.pixels else self.image_size
        return math.ceil(size / (self.crop or 1.0))

    def _cut(self, image: Image.Image, size: int, view: View) -> np.ndarray:
        mirror = view.flip and self.flip
        if self.crop is None:
            return fit(image, size, mirror=mirror)
        x, y, zoom = view.crop
        return fit(image, size, x=x, y=y, zoom=1 - zoom * (1 - self.crop), mirror=mirror)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of `Pairs` as one batch.

    Tensors `condition [B, 3, C, C]` (or `[B, K, 3, C, C]`), `target [B, 3, S, S]` float32 in [-1, 1], `noise
    [B, 3, S, S]` float32, `u [B]` float64, `drop [B]` bool, `index [B]` int64, and `bad`, all the items' (path,
    reason) in one list. Where tokens are stored, also `tokens [B, K M, C]` fp16 and `pooled [B, C]` float32, the mean
    over the conditions, and `target_tokens [B, M, C]` fp16 where they are asked for.
    """
    noise = torch.empty(len(items), *items[0]["noise"].shape)
    # torch's own memory: numpy's is aligned by chance, and that can change how later sums are rounded
    for row, item in zip(noise, items, strict=True):
        row.copy_(torch.from_numpy(item["noise"]))
    inputs = {}
    if "condition" in items[0]:
        inputs["condition"] = pixels(np.stack([item["condition"] for item in items]))
    if "tokens" in items[0]:
        inputs["tokens"] = gathered([item["tokens"] for item in items]).flatten(1, 2)
        inputs["pooled"] = gathered([item["pooled"] for item in items]).float().mean(1)
    if "target_tokens" in items[0]:
        inputs["target_tokens"] = gathered([[item["target_tokens"]] for item in items])[:, 0]
    return {
        **inputs,
        "target": to_tensor([item["target"] for item in items]),
        "noise": noise,
        "u": torch.tensor([item["u"] for item in items], dtype=torch.float64),
        "drop": torch.tensor([item["drop"] for item in items], dtype=torch.bool),
        "index": torch.tensor([item["index"] for item in items], dtype=torch.int64),
        "bad": [entry for item in items for entry in item["bad"]],
    }


def gathered(rows: list[Sequence[np.ndarray]]) -> Tensor:
    """Arrays that lie in mapped files, `[B][K]` of one shape, as one tensor: the only copy that is made of them."""
    batch = torch.empty(len(rows), len(rows[0]), *rows[0][0].shape, dtype=torch.float16)
    for place, row in zip(batch.numpy(), rows, strict=True):
        for slot, array in zip(place, row, strict=True):
            slot[...] = array
    return batch


def streamed(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose stored tokens are one `Stream` in the place of `condition`, whose pictures become `shown`."""
    if "tokens" not in batch:
        return batch
    rest = {name: value for name, value in batch.items() if name not in ("tokens", "pooled", "condition")}
    shown = {"shown": batch["condition"]} if "condition" in batch else {}
    return {**rest, **shown, "condition": Stream(batch["tokens"], batch["pooled"])}


def pixels(pictures: np.ndarray) -> Tensor:
    """`to_tensor` for arrays with any number of leading dimensions: `[..., S, S, 3]` to `[..., 3, S, S]`."""
    flat = to_tensor(pictures.reshape(-1, *pictures.shape[-3:]))
    return flat.reshape(*pictures.shape[:-3], *flat.shape[1:])


def batches(
    dataset: Pairs,
    *,
    first_index: int,
    batch: int,
    workers: int,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, Any]]:
    """Endless batches (see `collate` and `streamed`) of consecutive indices from `first_index` on,
    with their tensors on `device`, `u` on the host.

    Args:
        batch: samples of each batch over all processes.
        part: (which, of how many) equal parts of each batch this process takes; batch must be divisible.

    The same bytes for any number of workers (0 loads in this process). Worker processes end when the iterator is
    closed or forgotten. The global random state of torch is not touched.

    Raises:
        UserError: as `Pairs.__getitem__`, also from a worker.
    """
    device = torch.device(device)
    loader = DataLoader(
        _Fetch(dataset),
        batch_sampler=_ranges(first_index, batch, *part),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        # of its own, since the loader draws a seed from it
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    try:
        for loaded in iterator:
            if isinstance(loaded, UserError):
                raise loaded
            # u stays on the host, where noise levels are worked out in float64
            tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor) and k != "u"}
            moved = {k: v.to(device, non_blocking=True) for k, v in tensors.items()}
            yield streamed({**loaded, **moved})
    finally:
        # the workers are stopped by its destructor
        del iterator


def bad_record(path: str, reason: str) -> dict[str, str]:
    """One line of `bad_samples.jsonl`."""
    return {"path": path, "reason": reason}


class _Fetch(Dataset):
    """Hands a `UserError` on as a value: the loader would bury its one line in the worker's traceback."""

    def __init__(self, dataset: Pairs):
        self.dataset = dataset

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, Any]] | UserError:
        try:
            self.dataset.prefetch(indices)
            return [self.dataset[index] for index in indices]
        except UserError as error:
            return error


def _collate(items: list[dict[str, Any]] | UserError) -> dict[str, Any] | UserError:
    return items if isinstance(items, UserError) else collate(items)


def _ranges(first: int, batch: int, part: int, parts: int) -> Iterator[range]:
    own = batch // parts
    return (range(start, start + own) for start in itertools.count(first + part * own, batch))


def start_worker(_: int) -> None:
    """What a `DataLoader`'s processes begin with."""
    # the main process decides what these mean, and then ends the workers; a scheduler may send them to all alike
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module=r"PIL\.")
