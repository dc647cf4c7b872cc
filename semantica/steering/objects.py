"""Objects as sets of tokens, chosen by words of a prompt or by a region of the condition picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from semantica.errors import UserError


@dataclass(frozen=True, eq=False)
class Objects:
    """Named sets of tokens of one stream, the same for all samples or for each its own.

    An object's attention is the mean over its tokens.

    names: of the S objects.
    index: int64 `[B or 1, T]`, the tokens of all objects one after another, filled up with any.
    member: fp32 `[B or 1, T, S]`, how much of an object each token is; columns sum to 1.
    """

    names: tuple[str, ...]
    index: Tensor
    member: Tensor

    @classmethod
    def of(cls, sets: Mapping[str, Sequence[int]]) -> "Objects":
        """Of `{name: tokens}`, for all samples.

        Raises:
            UserError: no object, or one without tokens.
        """
        if not sets:
            raise UserError("no object is named: steering needs at least one")
        for name, tokens in sets.items():
            if not tokens:
                raise UserError(f"object {name!r} has no tokens: choose a word, or a region with at least one patch")
            if any(token < 0 for token in tokens):
                raise UserError(f"object {name!r} has token {min(tokens)}: they count from 0")
        flat = [token for tokens in sets.values() for token in tokens]
        member = torch.zeros(1, len(flat), len(sets))
        start = 0
        for number, tokens in enumerate(sets.values()):
            member[0, start : start + len(tokens), number] = 1 / len(tokens)
            start += len(tokens)
        return cls(tuple(sets), torch.tensor([flat]), member)

    @classmethod
    def stack(cls, samples: Sequence["Objects"]) -> "Objects":
        """Of samples with objects of the same names and tokens of their own.

        Raises:
            UserError: names differ.
        """
        if len({objects.names for objects in samples}) != 1:
            raise UserError("samples have objects of other names: name the same in all of them")
        most = max(objects.index.shape[1] for objects in samples)
        index, member = [], []
        for objects in samples:
            missing = most - objects.index.shape[1]
            index.append(torch.nn.functional.pad(objects.index, (0, missing)))
            member.append(torch.nn.functional.pad(objects.member, (0, 0, 0, missing)))
        return cls(samples[0].names, torch.cat(index), torch.cat(member))

    def repeat(self, times: int) -> "Objects":
        """Each sample's `times` times in a row, as `Condition.repeat`."""
        if len(self.index) == 1:
            return self
        return Objects(self.names, *(a.repeat_interleave(times, 0) for a in (self.index, self.member)))

    def to(self, device: torch.device | str) -> "Objects":
        return Objects(self.names, self.index.to(device), self.member.to(device))

    def rows(self, names: Sequence[str]) -> list[int]:
        """Numbers of the objects of these names; of all without. Raises `UserError` for an unknown name."""
        for name in names:
            if name not in self.names:
                raise UserError(f"no object is called {name!r}: there are {', '.join(self.names)}")
        return [self.names.index(name) for name in names or self.names]
