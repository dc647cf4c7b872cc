"""What is installed, what the machine offers, what the package will use of it and why: one line per fact."""

import importlib.util
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from semantica import native
from semantica.errors import UserError, device_failure, first_line

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

DISTRIBUTION = "semantica-diffusion"
Status = Literal["ok", "note", "warning", "problem"]
COLOURS = {"ok": "green", "note": "dim", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Fact:
    """One line of the report. `note`: something optional is absent; `warning`: it works, but should be mended;
    `problem`: it does not work."""

    section: str
    name: str
    value: str
    status: Status = "ok"


def collect() -> list[Fact]:
    """Every fact, in the order in which it is printed. A check that fails is a fact too: nothing is raised."""
    checks = {
        "versions": versions,
        "devices": devices,
        "compiled part": compiled,
        "operators": operators,
        "self-attention": attention,
        "encoders": encoders,
        "engines": engines,
        "optional packages": optional,
        "environment": environment,
    }
    return [fact for section, check in checks.items() for fact in attempt(section, check)]


def attempt(section: str, check: Callable[[], Iterator[tuple[str, str, Status]]]) -> Iterator[Fact]:
    try:
        for name, value, status in check():
            yield Fact(section, name, value, status)
    # whatever is broken in an installation may raise anything, and must not hide the other facts
    except Exception as error:
        yield Fact(section, check.__name__, f"{type(error).__name__}: {' '.join(str(error).split())}", "problem")


def versions() -> Iterator[tuple[str, str, Status]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", "ok"
    own = installed(DISTRIBUTION)
    if own is None:
        yield DISTRIBUTION, f"not installed: pip install {DISTRIBUTION}", "problem"
        return
    yield DISTRIBUTION, f"{own} in {Path(__file__).parent}", "ok"
    for name, specifier in required(""):
        version = installed(name)
        if version is None:
            yield name, f'missing: pip install "{name}{specifier}"', "problem"
        elif not specifier.contains(version, prereleases=True):
            yield name, f'{version}, but {specifier} is needed: pip install "{name}{specifier}"', "problem"
        else:
            yield name, version, "ok"
    triton = installed("triton")
    yield (
        "triton",
        triton or "missing: the fused GPU kernels need it; it comes with torch's CUDA builds on Linux",
        ("ok" if triton else "note"),
    )


def devices() -> Iterator[tuple[str, str, Status]]:
    import psutil
    import torch

    yield (
        "cpu",
        f"{processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, "
        f"{psutil.virtual_memory().total / 2**30:.1f} GiB memory",
        "ok",
    )
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        old = "; the fused kernels need 8.0: plain torch serves" * (card.major < 8)
        yield (
            f"cuda:{index}",
            f"{card.name}, {card.total_memory / 2**30:.1f} GiB memory, compute capability {card.major}.{card.minor}, "
            f"{card.multi_processor_count} multiprocessors{old}",
            "warning" if old else "ok",
        )
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"this torch is built for {built}, but {no_gpu()}" if built else "this torch is built for the CPU only"
        yield "cuda", f"none: {why}", "note"
    if torch.backends.mps.is_available():
        yield "mps", "available", "ok"


def no_gpu() -> str:
    """Why a torch that was built for GPUs finds none, in its own words: no driver, or one that is too old."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"finds no GPU: {device_failure(error) or first_line(error)}"
    return "finds no GPU"


def compiled() -> Iterator[tuple[str, str, Status]]:
    yield from cpp()
    module, reason = native.load("_cuda")
    if module is None:
        yield "semantica._cuda", reason, "note"
        return
    info, driver, trouble = module.build_info(), module.driver(), module.trouble()
    what = f"{info['compiler']}, for {', '.join(info['architectures'])}; CUDA {info['runtime']} inside"
    if trouble is None:
        yield "semantica._cuda", f"loaded; {what}, the driver knows {driver}", "ok"
    elif driver is None:
        yield "semantica._cuda", f"loaded, for machines with a GPU: there is no driver here; {what}", "note"
    else:
        yield "semantica._cuda", f"does not run: {trouble}; {what}, the driver knows {driver}: update it", "warning"


def cpp() -> Iterator[tuple[str, str, Status]]:
    module, reason = native.load()
    if module is None:
        yield "semantica._C", reason, "note"
        return
    info = module.build_info()
    threads = f"OpenMP with {info['threads']} threads" if info["openmp"] else "no OpenMP: one thread"
    yield "semantica._C", f"loaded; {info['compiler']}, C++{info['cxx_standard']}, {threads}", "ok"
    features = module.cpu_features()
    has = [name for name, present in features.items() if present]
    lacks = [name for name, present in features.items() if not present]
    parts = [f"has {', '.join(has)}"] * bool(has) + [f"lacks {', '.join(lacks)}"] * bool(lacks)
    yield "processor", "; ".join(parts) or "no x86 vector extensions to ask for", "ok"


def operators() -> Iterator[tuple[str, str, Status]]:
    import torch

    from semantica import kernels

    lacks = native.no_triton() if torch.cuda.is_available() and installed("triton") else None
    if lacks is not None:
        yield "triton", f"it compiles no kernel for the first time here: {lacks}", "problem"
    for name, devices in kernels.implementations().items():
        for device, (implementation, reason) in devices.items():
            yield f"{name}, {device}", f"{implementation} ({reason})", "ok"


def attention() -> Iterator[tuple[str, str, Status]]:
    import torch

    from semantica.model.attention import choose

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, reason = choose(device)
    yield device.type, f"{backend} ({reason})", "ok"


def encoders() -> Iterator[tuple[str, str, Status]]:
    from semantica.model.encoders import ENCODERS

    for name, kind in ENCODERS.items():
        yield name, (kind.__doc__ or "").partition("\n")[0].rstrip("."), "ok"


def engines() -> Iterator[tuple[str, str, Status]]:
    from semantica.engines import BACKENDS

    for name, backend in BACKENDS.items():
        reason = backend.why_not()
        yield name, reason or f"runs bundles on {backend.place}", "note" if reason else "ok"


def optional() -> Iterator[tuple[str, str, Status]]:
    for extra in metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []:
        found = {name: installed(name) for name, _ in required(extra)}
        missing = [name for name, version in found.items() if version is None]
        text = ", ".join(f"{name} {version}" for name, version in found.items() if version)
        if missing:
            # flash-attn's build imports the installed torch
            flag = "--no-build-isolation " if extra == "flash" else ""
            how = f'missing {", ".join(missing)}: pip install {flag}"{DISTRIBUTION}[{extra}]"'
            text = f"{text}; {how}" if text else how
        yield extra, text, "note" if missing else "ok"


def environment() -> Iterator[tuple[str, str, Status]]:
    owners = set(metadata.packages_distributions().get("semantica", [])) - {DISTRIBUTION}
    if owners:
        names = " ".join(sorted(owners))
        yield (
            "import semantica",
            f"{names} owns this import name too, and the two overwrite each other: "
            f"pip uninstall {names} {DISTRIBUTION}, then install {DISTRIBUTION} again",
            "problem",
        )
    if installed("onnxruntime") and installed("onnxruntime-gpu"):
        yield (
            "onnxruntime",
            "onnxruntime and onnxruntime-gpu write the same files: pip uninstall both, then install the one you want",
            "warning",
        )
    shadow = importlib.util.find_spec("kernels")
    own = importlib.util.find_spec("semantica.kernels")
    if shadow and own and shadow.origin and own.origin and os.path.samefile(shadow.origin, own.origin):
        yield (
            "import kernels",
            f"finds this package's own folder, because {Path(own.origin).parents[1]} is on Python's path: run the "
            "semantica command instead of a script from there, or python -P",
            # transformers and diffusers import from the distribution of that name as soon as it is installed
            "problem" if installed("kernels") else "warning",
        )


def installed(name: str) -> str | None:
    """The version of a distribution, None when it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def required(extra: str) -> Iterator[tuple[str, "SpecifierSet"]]:
    """`(name, version specifier)` of what this distribution needs always (`""`), or what one extra adds."""
    from packaging.requirements import Requirement

    for line in metadata.requires(DISTRIBUTION) or []:
        need = Requirement(line)
        always = need.marker is None or need.marker.evaluate({"extra": ""})
        if always if not extra else not always and need.marker.evaluate({"extra": extra}):
            yield need.name, need.specifier


def processor() -> str:
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return model[1] if model else platform.processor() or platform.machine()


@dataclass(frozen=True)
class DoctorConfig:
    """Say what is installed, what the machine offers, and what the package will use of it and why."""

    presets: bool = False
    """Print the table of model sizes instead."""
    model: Path | None = None
    """Print instead what `semantica.accelerate` replaces in a folder of diffusers, and what not and why."""


def run(config: DoctorConfig) -> int:
    """Print the facts, or one of the tables; returns the exit code: 1 for a problem, else 0."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if config.presets and config.model:
        raise UserError("--presets and --model are a table each: give one of them")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if config.presets or config.model:
        if config.model:
            from semantica.fused.survey import survey

            rows = [asdict(row) for row in survey(config.model)]
        else:
            from semantica.model.cost import preset_table

            rows = preset_table()
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*map(str, row.values()))
        console.print(table)
        return 0
    facts = collect()
    width = max(len(fact.name) for fact in facts)
    section = ""
    for fact in facts:
        if fact.section != section:
            section = fact.section
            console.print(Text(section, style="bold"))
        line = Text("  ").append(f"{fact.status.upper() if fact.status != 'ok' else 'OK':<8}", COLOURS[fact.status])
        console.print(line.append(f" {fact.name:<{width}}  {fact.value}"))
    count = {status: sum(fact.status == status for fact in facts) for status in ("warning", "problem")}
    console.print(f"{count['problem']} problem(s), {count['warning']} warning(s)")
    return 1 if count["problem"] else 0
