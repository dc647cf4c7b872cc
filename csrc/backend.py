"""The build backend: setuptools', with what pip is told about CUDA (`pip install -C NAME=VALUE`).

cuda: for which GPUs `semantica._cuda` is compiled. "auto" (the default): those of this machine, if there are any and a
    compiler is; "all": every architecture that there are kernels for, as for an image or a wheel, without any GPU;
    or some of them, such as "sm_90a,sm_120a"; "no".
cuda-compiler: "packages" fetches the compiler for this build alone, in packages of the index; or the path of an nvcc.
"""

import configparser
import os
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable", "build_sdist", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_sdist",
    "get_requires_for_build_wheel", "prepare_metadata_for_build_editable", "prepare_metadata_for_build_wheel",
]  # fmt: skip
OURS, PACKAGES = ("cuda", "cuda-compiler"), "packages"


@contextmanager
def told(settings: dict | None) -> Iterator[dict]:
    """Ours as settings of the command that compiles, in the file that distutils reads beside setup.cfg; the others.

    setuptools passes options on to it for wheels only, not where an install is editable.
    """
    rest = dict(settings or {})
    asked = {name: rest.pop(name) for name in OURS if name in rest}
    if asked.get("cuda-compiler") == PACKAGES:
        del asked["cuda-compiler"]
    if not asked:
        yield rest
        return
    name, file = "DIST_EXTRA_CONFIG", configparser.RawConfigParser()
    before = os.environ.get(name)
    file.read(before or ())
    file.read_dict({"build_ext": {name.replace("-", "_"): value for name, value in asked.items()}})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.cfg"
        with path.open("w") as out:
            file.write(out)
        os.environ[name] = str(path)
        try:
            yield rest
        finally:
            os.environ.pop(name)
            os.environ |= {name: before} if before is not None else {}


def required(settings: dict | None) -> list[str]:
    """What building needs beside `build-system.requires`."""
    if (settings or {}).get("cuda-compiler") != PACKAGES:
        return []
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]["optional-dependencies"]["cuda-build"]


def get_requires_for_build_wheel(config_settings=None):
    with told(config_settings) as rest:
        return build_meta.get_requires_for_build_wheel(rest) + required(config_settings)


def get_requires_for_build_editable(config_settings=None):
    with told(config_settings) as rest:
        return build_meta.get_requires_for_build_editable(rest) + required(config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    with told(config_settings) as rest:
        return build_meta.build_wheel(wheel_directory, rest, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    with told(config_settings) as rest:
        return build_meta.build_editable(wheel_directory, rest, metadata_directory)
