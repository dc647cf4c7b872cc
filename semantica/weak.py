"""The branch that guidance leads away from, as a value: v = weak + w (own - weak); numpy only.

Kinds of guidance differ in nothing else: the null condition (classifier-free guidance), another sample's condition
(independent condition guidance), an embedding with noise in it (time-step guidance), another network (autoguidance), a
part of the condition, below which there is nothing (a scale for each stream).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from semantica.condition import Array, Condition, concatenate

Made = TypeVar("Made")


@dataclass(frozen=True)
class Weak:
    """How the weak branch of guidance is predicted.

    condition: of the samples, `[B, ...]`; with `rows` a set `[P, ...]` that they choose from in each step.
    rows: integers `[steps, B]`, None where the condition is the same in all steps.
    shift: `[steps, B, E]` in the type of the condition's embedding, added to that; None for nothing.
    blocks: which blocks see the shift, in the order of computation; None for all of them.
    denoiser: what predicts the branch; None for the one that predicts the other branch too.
    under, scale: a third condition, which this branch is led away from by a scale of its own; None for two branches.
    """

    condition: Condition
    rows: Array | None = None
    shift: Array | None = None
    blocks: tuple[bool, ...] | None = None
    denoiser: Any = None
    under: Condition | None = None
    scale: float = 1.0

    @property
    def apart(self) -> bool:
        """Whether the branches are more than two of one denoiser, and so predicted one by one."""
        return self.denoiser is not None or self.under is not None

    @property
    def kind(self) -> tuple:
        """All that a run depends on but the values of the arrays."""
        return self.condition.sizes, self.rows is None, self.shift is None, self.blocks

    def at(self, step: int) -> Condition:
        """The condition `[B, ...]` in a step, the shift in its embedding: `[B, E]`, or `[B, blocks, E]` by `blocks`."""
        made = self.condition
        if self.rows is not None:
            chosen = self.rows[step]
            made = made.map(lambda array: array[chosen])
        if self.shift is None:
            return made
        shifted = made.emb + self.shift[step]
        if self.blocks is not None:
            shifted = concatenate([(shifted if seen else made.emb)[:, None] for seen in self.blocks], 1)
        return dataclasses.replace(made, emb=shifted)

    def each(self, make: Callable[[Condition], Made]) -> Callable[[int], Made]:
        """What is made of the condition in each step: once, where that is the same in all of them."""
        if self.rows is None and self.shift is None:
            made = make(self.condition)
            return lambda step: made
        return lambda step: make(self.at(step))

    def map(self, function: Callable[[Array], Array]) -> "Weak":
        """Apply a function to every array."""
        rows, shift = (a if a is None else function(a) for a in (self.rows, self.shift))
        under = self.under if self.under is None else self.under.map(function)
        return dataclasses.replace(self, condition=self.condition.map(function), rows=rows, shift=shift, under=under)
