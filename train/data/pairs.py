"""Pairs -> samples, where every random choice is a pure function of (seed, global sample index).

Sample `index` of a run is the same whichever process or worker makes it, and whether or not the run was interrupted.
Workers decode, cut and resize; what touches every number (mirroring, scaling, noise) is left to the device.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from semantica.errors import UserError
from semantica.images import BadImage
from semantica.sight import Sight
from semantica.train.data.batch import Layout, empty, finish, mean, stack
from semantica.train.data.draws import DROP, LEVEL, Pair, Ref, View, generator, strata
from semantica.train.data.source import Source

# pictures found broken for one sample before the data is given up
PATIENCE = 64
# large JPEGs are decoded at a fraction of their size, but not below so many times the side that is shown
MARGIN = 1.5


class Tokenizer(Protocol):
    """Texts to numbers, int64 `[len(texts), *shape]`."""

    shape: tuple[int, ...]

    def __call__(self, texts: Sequence[str]) -> np.ndarray: ...


class Drops(NamedTuple):
    """Shares of samples that lose a part of their condition: pictures, all texts, and the text of one encoder."""

    picture: float = 0.0
    text: float = 0.0
    tower: float = 0.0


NEVER = Drops()


class Pairs(Dataset):
    """Sample `index` (any non-negative integer) of a run, as a pure function of (data, options, seed, index).

    An item is a dict: `condition` uint8 `[C, C, 3]`, or `[K, C, C, 3]` for K > 1 conditions; `target` uint8
    `[S, S, 3]`; `flips`, 1 + K bools, whether the target and each condition are yet to be mirrored; `u` float in
    (0, 1), the noise level's quantile, stratified so that each global batch has one in each interval
    `[k / global_batch, (k + 1) / global_batch)`; `drop` bool, whether the condition is dropped, or where there are
    several streams a bool for each, pictures first; `index`; `bad`, a list of (path, reason) of pictures that proved
    broken and were replaced by the next usable ones.

    Data with stored tokens have `tokens`, fp16 `[M, C]` for each condition, and `pooled`, float32 `[C]`, the mean over
    them, instead of `condition`: those of its centre, mirrored where the picture would be.

    With tokenizers there are `text`, `text_2`, ... too, the numbers of a text of the target, and `caption`, that text.
    `group` is what the target's group is known by.

    Args:
        image_size, condition_size: S and C in pixels; C defaults to S.
        sight: what the encoder sees of a condition; by default its whole middle square.
        conditions: K, pictures that each target is conditioned on; 0 for texts alone.
        global_batch: samples per optimizer step, over all processes and micro-batches.
        drop: probability of dropping the condition, pictures and text together.
        drop_each: of dropping the picture, the text, and one encoder's text, each by itself, where there are several.
        flip: mirror each picture with probability 1/2.
        crop: the smallest side of a random square crop, as a share of the shorter side (1: random place only);
            None takes the centre.
        pixels: give `condition` too where tokens are stored, to be looked at.
        target_tokens: give the stored tokens of the target too, `target_tokens` `[M, C]`.
        tokenizers: of texts, where they condition too, by the names of their streams.

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
        sight: Sight | None = None,
        conditions: int = 1,
        global_batch: int,
        drop: float = 0.1,
        flip: bool = True,
        crop: float | None = 1.0,
        pixels: bool = False,
        target_tokens: bool = False,
        tokenizers: Mapping[str, Tokenizer] | None = None,
        drop_each: Drops = NEVER,
    ):
        for share in (drop, *drop_each):
            if not 0 <= share <= 1:
                raise UserError(f"condition dropout {share} is out of range: give a probability from 0 to 1")
        if crop is not None and not 0 < crop <= 1:
            raise UserError(f"crop {crop} is out of range: give a share of the picture above 0 and at most 1")
        if crop is not None and (target_tokens or (data.tokens and data.mode == "reconstruct")):
            raise UserError("stored tokens show the centre of a picture, and here the target's: give --crop centre")
        self.data = data
        self.seed = seed
        self.image_size = image_size
        self.condition_size = condition_size or image_size
        self.sight = sight or Sight(self.condition_size)
        self.conditions = conditions
        self.global_batch = global_batch
        self.drop = drop
        # how many texts they cut is said once, not for each
        self.tokenizers = {name: getattr(each, "quiet", each) for name, each in (tokenizers or {}).items()}
        # several streams may be dropped apart
        self.streams = len(self.tokenizers) + (conditions > 0)
        self.drop_each = drop_each
        self.flip = flip
        self.crop = crop
        self.stored = data.tokens is not None and conditions > 0
        self.pixels = conditions > 0 and (pixels or not self.stored)
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
        inputs = {}
        if self.pixels:
            views = zip(conditions, pair.conditions)
            cuts = [self._cut(image, self.sight, view) for (_, image), view in views]
            inputs["condition"] = cuts[0] if self.conditions == 1 else np.stack(cuts)
        if self.stored:
            views = zip(conditions, pair.conditions)
            stored = [self.data.tokens.read(ref, view.flip and self.flip) for (ref, _), view in views]
            inputs["tokens"], pooled = zip(*stored)
            inputs["pooled"] = mean(pooled)
        if self.target_tokens:
            inputs["target_tokens"], _ = self.data.tokens.read(shown, pair.target.flip and self.flip)
        if self.tokenizers:
            inputs["caption"] = self.data.captions.draw(shown, self.seed, index)
        for name, tokenizer in self.tokenizers.items():
            (inputs[name],) = tokenizer([inputs["caption"]])
        return {
            **inputs,
            # a picture that is its own condition is a group of its own
            "group": shown if self.data.mode == "reconstruct" else pair.group,
            "target": self._cut(target, Sight(self.image_size), pair.target),
            "flips": [view.flip and self.flip for view in (pair.target, *pair.conditions[: self.conditions])],
            "u": (int(strata(self.global_batch, self.seed, batch)[position]) + within) / self.global_batch,
            "drop": self._dropped(index),
            "index": index,
            "bad": bad,
        }

    def _dropped(self, index: int) -> bool | np.ndarray:
        """Whether the condition is dropped, or of several streams which of them."""
        draw, (picture, text, tower) = generator(self.seed, DROP, index), self.drop_each
        whole = bool(draw.random() < self.drop)
        if self.streams < 2:
            return whole
        # both are drawn where there are no pictures, too
        lost_picture, lost_text = draw.random(2) < (picture, text)
        if not self.conditions:
            lost_text = False
        towers = len(self.tokenizers)
        texts = lost_text | (draw.random(towers) < tower) if towers > 1 else np.full(towers, lost_text)
        return whole | np.append(np.full(min(1, self.conditions), lost_picture), texts)

    def batch(self, indices: Iterable[int], device: torch.device | str = "cpu") -> dict[str, Any]:
        """These samples as the trainer takes them, see `semantica.train.data.batch.finish`, loaded here and now; their
        groups as `group`, and texts as `captions` too."""
        indices = list(indices)
        self.prefetch(indices)
        items = [self[index] for index in indices]
        batch = empty(self.layout(), len(items))
        stack(items, batch)
        texts = {"captions": [item["caption"] for item in items]} if self.tokenizers else {}
        bad = [entry for item in items for entry in item["bad"]]
        groups = [item["group"] for item in items]
        return finish({**batch, **texts, "bad": bad, "group": groups}, self.seed, device)

    def layout(self) -> Layout:
        """What of a sample goes into a batch: all but `bad`, `group` and `caption`."""
        several = (self.conditions,) if self.conditions > 1 else ()
        layout = {"target": ((self.image_size, self.image_size, 3), torch.uint8)}
        if self.pixels:
            layout["condition"] = (*several, self.condition_size, self.condition_size, 3), torch.uint8
        if self.data.tokens:
            count, width = self.data.tokens.shape
            stored = {"tokens": ((self.conditions, count, width), torch.float16), "pooled": ((width,), torch.float32)}
            layout |= stored if self.stored else {}
            if self.target_tokens:
                layout["target_tokens"] = (count, width), torch.float16
        for name, tokenizer in self.tokenizers.items():
            layout[name] = tokenizer.shape, torch.int64
        dropped = () if self.streams < 2 else (self.streams,)
        rest = {"u": ((), torch.float64), "drop": (dropped, torch.bool), "index": ((), torch.int64)}
        return layout | {"flips": ((1 + self.conditions,), torch.bool)} | rest

    def prefetch(self, indices: Iterable[int]) -> None:
        """Let the data fetch what these samples will show, all at once."""
        if self.data.remote:
            draws = [self._draw(index) for index in indices]
            views = [view for pair in draws for view in (pair.target, *(pair.conditions if self.pixels else ()))]
            self.data.prefetch({view.ref for view in views})

    def _draw(self, index: int) -> Pair:
        """A pair has at least one condition, whether or not it is shown."""
        return self.data.draw(self.seed, index, max(1, self.conditions))

    def _load_pair(self, index: int, bad: list[tuple[str, str]]) -> tuple[Pair, list[tuple[Ref, np.ndarray | None]]]:
        """A usable pair, and its pictures with their references: the target, then the conditions."""
        same, stored = self.data.mode == "reconstruct", self.data.tokens is not None
        wanted = self.stored and same or self.target_tokens
        # every picture is a target at least once in that span
        for later in range(index, index + 2 * len(self.data)):
            pair = self._draw(later)
            candidates = self.data.target_candidates(pair.group, pair.target.ref)
            found = self._first_usable(candidates, bad, True, stored and wanted)
            if found is None:
                continue
            if same:
                return pair, [found] * (1 + self.conditions)
            images, target = [found], found[0]
            for view in pair.conditions[: self.conditions]:
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
    ) -> tuple[Ref, np.ndarray | None] | None:
        """The first of the pictures that decodes, and that has stored tokens, as far as these are asked for."""
        known = {name for name, _ in bad}
        for ref in candidates:
            name = self.data.name_of(ref)
            if name in known:
                continue
            try:
                if stored:
                    self.data.tokens.check(ref)
                return ref, self.data.pixels(ref, self._near) if decode else None
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
        size = max(self.image_size, self.sight.size / self.sight.zoom) if self.pixels else self.image_size
        return math.ceil(MARGIN * size / (self.crop or 1.0))

    def _cut(self, pixels: np.ndarray, sight: Sight, view: View) -> np.ndarray:
        if self.crop is None:
            return sight.cut(pixels)
        x, y, zoom = view.crop
        return sight.cut(pixels, x, y, 1 - zoom * (1 - self.crop))


def bad_record(path: str, reason: str) -> dict[str, str]:
    """One line of `bad_samples.jsonl`."""
    return {"path": path, "reason": reason}
