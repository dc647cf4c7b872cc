"""Wheels that a machine without a network lacks: found, fetched and checked; `benchmarks/gpu.sh pack` calls this.

What is there is taken as it is: nothing of it is replaced unless a requirement says so.
"""

import email
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated

import tyro
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from semantica.benchmarks.harness.table import show
from semantica.doctor import DISTRIBUTION
from semantica.errors import ArtifactError, UserError, first_line

ROOT = Path(__file__).parents[1]
EXTRAS = ("train", "bench", "export")
# to build and to test the package there, and a rival of the races
MORE = ("setuptools>=77", "pybind11>=2.13", "pytest>=8.3", "hypothesis>=6.100", "liger-kernel")
# generations of glibc that wheels are for; pip takes each name as it stands
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34, 35)))


@dataclass(frozen=True)
class PackConfig:
    """Fetch the wheels that a machine without a network lacks, and check that with them every requirement is met."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder for the wheels; those of an earlier call that are not needed any more are removed."""
    image: Annotated[Path, tyro.conf.Positional] = ROOT / "benchmarks" / "gpu-image.txt"
    """What is there: lines NAME==VERSION, or NAME; python==VERSION is Python itself."""
    limit_mb: float = 60.0
    """More than this is an error: what carries the wheels there may take no more."""
    more: tuple[str, ...] = MORE
    """Requirements beside the package's own."""


@dataclass
class Plan:
    """What is there, what is added, and which requirements neither meets.

    Attributes:
        there: version by name, None where it is not known. pins: versions that were tested together.
        added: version by name of what is packed. why: who asked for it first. problems: unmet requirements, in words.
        unknown: requirements of packages whose version there is not known.
    """

    there: dict[str, str | None]
    pins: dict[str, str]
    python: str
    added: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def environment(self, extra: str) -> dict[str, str]:
        """For the markers of requirements: Linux, and the Python there."""
        short = ".".join(self.python.split(".")[:2])
        return {
            "python_version": short, "python_full_version": self.python, "sys_platform": "linux", "os_name": "posix",
            "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
            "platform_python_implementation": "CPython", "extra": extra,
        }  # fmt: skip

    def applies(self, need: Requirement, extras: Iterable[str]) -> bool:
        return need.marker is None or any(need.marker.evaluate(self.environment(extra)) for extra in ("", *extras))

    def meets(self, need: Requirement, who: str) -> bool:
        """Whether what is there or added will do; what is added and will not is a problem."""
        name = canonicalize_name(need.name)
        if name in self.added:
            if not need.specifier.contains(self.added[name], prereleases=True):
                self.problems.append(f"{who} needs {need.name}{need.specifier}, {self.added[name]} is packed")
            return True
        if name not in self.there:
            return False
        version = self.there[name]
        if version is None:
            if str(need.specifier):
                self.unknown.append(f"{need.name}{need.specifier} of {who}")
            return True
        return need.specifier.contains(version, prereleases=True)


def listed(path: Path) -> tuple[dict[str, str | None], str]:
    """Versions by name, and Python's, from a list such as pip freeze prints.

    Raises:
        UserError: no such file, or it does not say which Python it is of.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    found = {}
    for line in lines:
        # pip freeze has addresses of what was built from files, python --version a space
        entry = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:(?:==|\s)\s*([^\s;#]+))?\s*(?:@.*)?$", line)
        if entry:
            found[canonicalize_name(entry[1])] = entry[2]
    python = found.pop("python", None)
    if python is None:
        raise UserError(f"{path} does not say which Python it is of: add a line such as python==3.12.3")
    return found, python


def pinned(path: Path) -> dict[str, str]:
    """Versions by name from a file of constraints."""
    pairs = (line.split("==") for line in path.read_text().splitlines() if "==" in line and line[0] != "#")
    return {canonicalize_name(name): version for name, version in pairs}


def wheel_needs(path: Path) -> tuple[str, list[Requirement]]:
    """Version and requirements of a wheel."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        head = email.message_from_bytes(archive.read(name))
    return head["Version"], [Requirement(line) for line in head.get_all("Requires-Dist") or []]


def fetch(need: Requirement, plan: Plan, out: Path) -> Path:
    """The wheel of a requirement: of the version that was tested with the others, or else the newest.

    Raises:
        ArtifactError: there is no wheel for that Python on Linux.
    """
    pin = plan.pins.get(canonicalize_name(need.name))
    asked = f"{need.name}=={pin}" if pin and need.specifier.contains(pin) else f"{need.name}{need.specifier}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp", "--python-version", plan.python, "--dest", str(out)]
    command += [f"--platform={name}" for name in PLATFORMS]
    done = subprocess.run([*command, asked], capture_output=True, text=True)
    name = canonicalize_name(need.name)
    wheels = [path for path in out.glob("*.whl") if canonicalize_name(path.name.split("-")[0]) == name]
    if done.returncode or len(wheels) != 1:
        why = (done.stderr.strip().splitlines() or [f"{len(wheels)} wheels of it are in {out}"])[-1]
        raise ArtifactError(f"{asked} cannot be packed for Python {plan.python}: {why}")
    return wheels[0]


def walk(plan: Plan, needs: Iterable[tuple[Requirement, str]], out: Path) -> Iterator[Path]:
    """Wheels of all that is missing, breadth first."""
    todo = list(needs)
    while todo:
        need, who = todo.pop(0)
        if plan.meets(need, who):
            continue
        path = fetch(need, plan, out)
        version, further = wheel_needs(path)
        name = canonicalize_name(need.name)
        plan.added[name], plan.why[name] = version, who
        # what is there of it, but too old, is replaced
        if plan.there.get(name):
            plan.why[name] += f", in place of {plan.there[name]}"
        yield path
        todo += [(item, f"{need.name} {version}") for item in further if plan.applies(item, need.extras)]


def pack(config: PackConfig) -> int:
    """Fetch, list and check; returns the exit code.

    Raises:
        UserError: a list that cannot be read. ArtifactError: a wheel that is not to be had, or too many bytes.
    """
    there, python = listed(config.image)
    pins = ROOT / "constraints.txt"
    plan = Plan(there, pinned(pins) if pins.exists() else {}, python)
    own = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    needs = [(need, DISTRIBUTION) for need in own if plan.applies(need, EXTRAS)]
    needs += [(Requirement(line), "gpu.sh") for line in config.more]
    config.out.mkdir(parents=True, exist_ok=True)
    for path in config.out.glob("*.whl"):
        path.unlink()
    wheels = list(walk(plan, needs, config.out))
    rows = [(n, v, f"{p.stat().st_size / 1e6:.2f}", plan.why[n]) for (n, v), p in zip(plan.added.items(), wheels)]
    show(("packed", "version", "MB", "for"), rows)
    size = sum(path.stat().st_size for path in wheels) / 1e6
    print(f"{len(wheels)} wheels, {size:.1f} MB, for Python {python} with {len(there)} packages there")
    if plan.unknown:
        print(f"taken as met, since no version is listed: {'; '.join(plan.unknown)}")
    for problem in plan.problems:
        print(f"unmet: {problem}")
    if size > config.limit_mb:
        raise ArtifactError(f"{size:.1f} MB of wheels are more than {config.limit_mb:g}: pack less with --more")
    print("every requirement is met" if not plan.problems else f"{len(plan.problems)} requirements are not met")
    return 1 if plan.problems else 0


if __name__ == "__main__":
    try:
        sys.exit(pack(tyro.cli(PackConfig, prog="gpu.sh pack")))
    except (UserError, ArtifactError) as error:
        print(f"gpu.sh pack: {first_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
