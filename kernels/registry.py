"""The table of the operators: all that tests, benchmarks, compile-only, tuning and `semantica doctor` know of them."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semantica.kernels import launch, replay
from semantica.kernels.dispatch import PLAIN, REGISTERED, load

DIRECTIONS = ("forward", "backward", "both")
# files of an operator's folder that no implementation is made of
DESCRIPTIVE = ("__init__", "cases", "specimens")


class Case(ABC):
    """One problem of an operator: a frozen dataclass of its sizes."""

    # of the first input in memory
    layout = "contiguous"

    @property
    @abstractmethod
    def description(self) -> str:
        """The sizes in words, as rows of results name them."""

    @abstractmethod
    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of the operator; on "meta" shapes alone."""

    @abstractmethod
    def flops(self, direction: str) -> int:
        """Floating-point operations of one of `DIRECTIONS`, a multiply-add counted as 2."""

    def reread_bytes(self, dtype: torch.dtype, direction: str, cache: int) -> int:
        """What a kernel that fuses everything reads again beside the least traffic, given the last cache's bytes."""
        return 0


@dataclass(frozen=True)
class Operator:
    """One operator, as the table holds it.

    Attributes:
        name: of its public function; rows of results and options of the command line use it.
        function: the public function; in an operator's folder `op.py` holds it.
        reference: plain torch; takes what `Case.inputs` draws, and returns one tensor.
        cases: what tests prove, by name.
        timed: what benchmarks time, from the kind of device ("cpu", "cuda") and whether few and small ones will do; by
            default `cases`.
        flop_formulas: for `torch.utils.flop_counter`, by name of the `torch.library` op.
        specimens: "module:function" that yields `(label, launches)` of every Triton kernel in every configuration, on
            meta tensors: to be compiled. Empty without such kernels.
        borrows: files of other operators' folders that its implementations are made of too, such as
            "cross_attention/tiles.py".
        planners: "module:function" from the keyword arguments to functions that plan launches, for tuning.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Tensor]
    cases: Mapping[str, Case]
    timed: Callable[[str, bool], Sequence[Case]] | None = None
    flop_formulas: Mapping[str, Callable[..., int]] = field(default_factory=dict)
    specimens: str = ""
    planners: str = ""
    borrows: Sequence[str] = ()

    @property
    def implementations(self) -> dict[str, tuple[str, str]]:
        """`{device: (implementation, reason)}`."""
        return {"cpu": PLAIN, "cuda": PLAIN, **REGISTERED.get(self.name, {})}

    @property
    def file(self) -> Path:
        """Where its cases are: `cases.py` of the operator's folder, or the one file that is all of it."""
        return Path(inspect.getfile(type(next(iter(self.cases.values())))))

    @property
    def ladder(self) -> Path:
        """File of its launch settings; see `launch.table`."""
        return self.file.with_name("ladder.json")

    def sources(self, gpu: bool) -> list[Path]:
        """Files that its implementations on GPUs, or on processors, are made of; `csrc` and launch settings apart."""
        if self.file.stem != "cases":
            return [self.file]
        files = {path.stem: path for path in sorted(self.file.parent.glob("*.py")) if path.stem not in DESCRIPTIVE}
        borrowed = [self.file.parents[1] / name for name in self.borrows]
        if not gpu:
            own = [files[stem] for stem in ("op", "cpu") if stem in files]
            return own + [path for path in borrowed if path.stem == "op"]
        own = [path for stem, path in files.items() if stem != "cpu"]
        return [Path(launch.__file__), Path(replay.__file__), *own, *borrowed]

    def output(self, case: Case, dtype: torch.dtype) -> Tensor:
        """What the operator returns for a case, on the meta device."""
        return self.function(**case.inputs(dtype, "meta"))

    def flops(self, case: Case, direction: str) -> int:
        """Floating-point operations, a multiply-add counted as 2."""
        return case.flops(direction)

    def bytes(self, case: Case, dtype: torch.dtype, direction: str) -> int:
        """Least traffic: every floating-point input read once, every result written once."""
        inputs = [v for v in case.inputs(dtype, "meta").values() if isinstance(v, Tensor) and v.is_floating_point()]
        given, out = sum(v.nbytes for v in inputs), self.output(case, dtype).nbytes
        forward, backward = given + out, 2 * given + out
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


OPERATORS: dict[str, Operator] = {}


def register_operator(operator: Operator) -> None:
    """Add an operator to the table."""
    # the same one may come twice, where a script in the root of the checkout sees this folder as a package of its own
    there = OPERATORS.setdefault(operator.name, operator)
    assert there is operator, f"there is an operator {operator.name} already"
    if operator.ladder.exists():
        launch.LADDERS[operator.name] = operator.ladder


def implementations() -> dict[str, dict[str, tuple[str, str]]]:
    """Which implementation each operator uses, and why: `{operator: {device: (implementation, reason)}}`."""
    return {name: operator.implementations for name, operator in OPERATORS.items()}


def specimens() -> Iterator[tuple[str, list[launch.Launch]]]:
    """`(name, launches)` of every Triton kernel in every configuration, on meta tensors: to be compiled.

    Raises:
        ImportError: Triton is not installed.
    """
    for name, operator in OPERATORS.items():
        for label, launches in load(operator.specimens)() if operator.specimens else ():
            yield f"{name} {label}", launches


def normal(
    shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype, device: str, mean: float = 0.0
) -> Tensor:
    """Normal numbers, drawn in fp64 so that every dtype and device gets the same; on "meta" the shape alone."""
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(device, dtype)
