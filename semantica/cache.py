"""What is worth keeping from process to process in the user's cache folder: found by everything that it depends on.

A cache is never needed: what is missing, unreadable or for another card, driver or version is made again.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from semantica.errors import UserError
from semantica.files import written

# files of a kind that are kept, the ones used last
MOST = 32


def folder(kind: str) -> Path:
    """Where files of a kind are, by the rules of each system (XDG, Apple, Windows); made if that is allowed."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        given = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    place = base / "semantica" / kind
    with suppress(OSError):
        # what is read from there is executed: nobody else may write it
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def path(kind: str, key: Mapping[str, Any]) -> Path:
    """Of the file that is kept for a key: other values, another file, so that nothing stale is ever read."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return folder(kind) / digest[:32]


def read(place: Path) -> bytes:
    """What is kept there; empty where nothing is."""
    try:
        content = place.read_bytes()
        os.utime(place)
    except OSError:
        return b""
    return content


def write(place: Path, content: bytes) -> None:
    """Keep something, whole or not at all; several processes may do so at once, and a full disk is no error."""
    with suppress(OSError, UserError), written(place, apart=True) as aside:
        aside.write_bytes(content)
    with suppress(OSError):
        names = (p for p in place.parent.iterdir() if re.fullmatch("[0-9a-f]{32}", p.name))
        for old in sorted(names, key=lambda p: p.stat().st_mtime, reverse=True)[MOST:]:
            old.unlink(missing_ok=True)


def keep_compiled() -> None:
    """What `torch.compile` makes outlives the temporary folder, unless torch was told otherwise.

    For the process of a command; torch's own keys name card, versions and code.
    """
    if folder("inductor").is_dir():
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder("inductor")))


def card(device: Any) -> dict[str, str]:
    """What compiled code for a CUDA device depends on: the card, its compute capability and the driver."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return {"card": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}", "driver": driver()}


def driver(said: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Version of NVIDIA's driver, such as "580.65.06"; "unknown" where the system does not say."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", said.read_text())
    except OSError:
        return "unknown"
    return found[0] if found else "unknown"
