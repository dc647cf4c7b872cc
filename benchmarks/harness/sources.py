"""Which code a stored row has timed: hashes of sources, the same wherever a file lies and however it is laid out.

Of a Python file the syntax tree counts, without docstrings and imports; comments, quotes and line breaks are not in it.
"""

import ast
import functools
import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

from semantica import nvcc

# modules and packages, these with all below them, that every whole run is made of
NETWORK = ("semantica.model", "semantica.condition", "semantica.inputs", "semantica.kernels")
SAMPLING = (
    *NETWORK, "semantica.solvers", "semantica.sampling", "semantica.engines", "semantica.pipelines", "semantica.export",
)  # fmt: skip
TRAINING = (*NETWORK, "semantica.diffusion", "semantica.memory", "semantica.train")
# public UNets in torch, and those that are exported first and run by an engine
UNETS = (
    "semantica.fused", "semantica.condition", "semantica.kernels", "semantica.solvers", "semantica.discrete",
    "semantica.sampling", "semantica.benchmarks.unets.contenders",
)  # fmt: skip
UNET_ENGINES = (*UNETS, "semantica.engines", "semantica.export", "semantica.benchmarks.unets.engines")
TUNING = ("semantica.fused", "semantica.kernels", "semantica.benchmarks.finetuning.contenders")
# by kind of row
SOURCES = {
    **dict.fromkeys(("unet", "decoder"), UNET_ENGINES),
    **dict.fromkeys(("unet_ladder", "decoder_ladder"), UNETS),
    "finetune": TUNING,
    "sample": SAMPLING,
    "sample_ladder": (*SAMPLING, "semantica.benchmarks.sampling.stock"),
    "train": TRAINING,
    "scaling": TRAINING,
    "sustained": TRAINING,
    "loading": ("semantica.images", "semantica.pixels", "semantica.train.data"),
}
# of the first two, what runs in torch: `semantica.accelerate`, and the denoiser made of it
IN_TORCH = (
    "accelerate", "accelerate-fp32", "accelerate-compile", "accelerate-tuned",
    "denoiser", "denoiser-eager", "denoiser-tuned",
)  # fmt: skip
# by kind of row and implementation: where that goes through less than the others of its kind, or through more
OTHERS = {
    **{(op, impl): UNETS for op in ("unet", "decoder") for impl in IN_TORCH},
    ("sample", "one-file"): (*SAMPLING, "semantica.export.one_file"),
}
# of the CUDA kernels, in a checkout
CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
# files and folders in them that no measured run goes through, or one implementation alone: what is proved, timed or
# compiled, mining, and what is made of bundles
LEFT_OUT = {"cases", "specimens", "pages", "products", "one_file", "repository", "web"}
# fields of syntax trees that say nothing, or that not every version of Python has
SILENT = {"ctx", "kind", "type_comment"}


def kernel_hash(op: str, arch: str, impl: str = "fused") -> str:
    """Of the sources that an operator's own implementation on an architecture is made of, and its launch settings.

    Args:
        arch: such as "sm_90"; anything else is a processor, where the compiled loops say themselves what they are made
            of.
        impl: "fused", or of some on GPUs the kernels of one kind, "triton" or "cuda".
    """
    from semantica.kernels import OPERATORS

    gpu = arch.startswith("sm_")
    files = OPERATORS[op].sources(gpu)
    if not gpu:
        return combined(files, built_from() if any(path.stem == "cpu" for path in files) else "")
    served = {"triton": (), "cuda": (cuda_built_from(),)}.get(impl, chosen(op, arch))
    return combined(files, ladders(op, arch), *served)


def source_hash(op: str, arch: str, impl: str = "") -> str:
    """Of the sources that a whole run of an implementation on an architecture is made of.

    Args:
        op: one of `SOURCES`. arch: as for `kernel_hash`. impl: goes through all of them unless `OTHERS` says else.
    """
    return hash_of(OTHERS.get((op, impl), SOURCES[op]), arch)


@functools.cache
def hash_of(modules: tuple[str, ...], arch: str) -> str:
    """Of modules and packages, and of what every operator is on an architecture."""
    from semantica.kernels import OPERATORS

    files = [path for name in modules for path in files_of(name)]
    choices = [part for name in sorted(OPERATORS) for part in chosen(name, arch)] if arch.startswith("sm_") else []
    return combined(files, built_from(), *(ladders(name, arch) for name in sorted(OPERATORS)), *choices)


def stale(row: dict) -> bool:
    """Whether the code that a row timed has changed since."""
    # rows of what others wrote have no hash, nor have those of processes that were stored before there was one
    if row.get("kernel_hash") is None:
        return False
    if row["op"] in SOURCES:
        return row["kernel_hash"] != source_hash(row["op"], row["arch"], row.get("impl", ""))
    return row["kernel_hash"] != kernel_hash(row["op"], row["arch"], row["impl"])


def combined(files: list[Path], *more: str) -> str:
    # ordered by content: a file that is moved or renamed is the same code
    parts = sorted(fingerprint(path) for path in files)
    return hashlib.sha256(json.dumps([parts, more]).encode()).hexdigest()[:16]


def files_of(name: str) -> list[Path]:
    """The Python files of a module, or of a package and all below it.

    Raises:
        ModuleNotFoundError: there are none: what has a hash of nothing would never be stale.
    """
    spec = find_spec(name)
    found = []
    if spec is not None and spec.submodule_search_locations is None:
        found = [Path(spec.origin)]
    elif spec is not None:
        folder = Path(spec.submodule_search_locations[0])
        every = ((path, path.relative_to(folder).with_suffix("")) for path in sorted(folder.rglob("*.py")))
        found = [path for path, place in every if not LEFT_OUT & {*place.parts}]
    if not found:
        raise ModuleNotFoundError(f"{name} has no sources: mend the tables of {__name__}", name=name)
    return found


def ladders(op: str, arch: str) -> str:
    """An operator's launch settings for an architecture, if it has any: tuning one leaves the rows of others fresh."""
    from semantica.kernels.launch import LADDERS

    table = json.loads(LADDERS[op].read_text()) if op in LADDERS else {}
    own = {kernel: found.get(arch, found["default"]) for kernel, found in table.items()}
    return json.dumps(own, sort_keys=True)


def chosen(op: str, arch: str) -> tuple[str, ...]:
    """Which calls of an operator CUDA kernels serve on an architecture, and what these are made of; () where none."""
    from semantica.kernels import OPERATORS

    path = OPERATORS[op].file.with_name("choice.json")
    table = json.loads(path.read_text()) if path.exists() else {}
    rows = {direction: table[direction].get(arch, []) for direction in ("forward", "backward") if direction in table}
    return (json.dumps(rows, sort_keys=True), cuda_built_from()) if any(rows.values()) else ()


def cuda_built_from() -> str:
    """What identifies the sources of `semantica._cuda`: its own word, else that of the checkout; empty without both."""
    from semantica.kernels import cuda

    if (built := cuda.module()) is not None:
        return built.build_info()["sources"]
    files = nvcc.sources(CUDA)
    return nvcc.digest(files) if files else ""


def built_from() -> str:
    """What identifies the sources of `semantica._C`; empty where it is not built."""
    try:
        from semantica import _C
    except ImportError:
        return ""
    return _C.build_info()["sources"]


def fingerprint(path: Path) -> str:
    """The SHA-256 of a Python file's syntax tree, the same in every version of Python that we support."""
    return hashlib.sha256(described(ast.parse(path.read_bytes())).encode()).hexdigest()


def described(value) -> str:
    """A syntax tree as text, or a part of it."""
    if isinstance(value, list):
        return f"[{','.join(described(item) for item in value if not speechless(item))}]"
    if not isinstance(value, ast.AST):
        # not repr: which characters it escapes depends on the version
        return ascii(value)
    if isinstance(value, ast.JoinedStr):
        # 3.12 ends some with an empty text
        value = ast.JoinedStr([part for part in value.values if getattr(part, "value", None) != ""])
    fields = ((name, getattr(value, name)) for name in value._fields if name not in SILENT)
    # what is absent or empty is left out, since later versions have more such fields
    told = ",".join(f"{name}={described(field)}" for name, field in fields if field not in (None, []))
    return f"{type(value).__name__}({told})"


def speechless(node) -> bool:
    """Whether a statement is an import, a docstring, or a condition around imports."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.If):
        return all(map(speechless, [*node.body, *node.orelse]))
    return isinstance(node, (ast.Import, ast.ImportFrom))
