"""Bytes of files in one folder, local or behind an fsspec URL, in any process."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from semantica.errors import UserError, first_line
from semantica.images import BadImage

# where shards may be read from; others can run programs or chain to such as can
PROTOCOLS = {"file", "memory", "http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf"}


class Places:
    """A file to read places of, in any process and thread; closed once it is forgotten."""

    def __init__(self, path: Path):
        self.file = open(path, "rb", buffering=0)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.file.fileno(), size, offset)

    def __del__(self):
        # none where there was no such file
        with suppress(AttributeError):
            self.file.close()


class Store:
    """Bytes of files in one folder, local or behind an fsspec URL; also in a process that was forked since.

    Raises:
        UserError: a protocol that is not read, or whose package is missing.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = str(root)
        protocol = self.root.split("://")[0] if "://" in self.root else self.root.split(":")[0]
        self.remote = "://" in self.root
        if (self.remote and protocol not in PROTOCOLS) or protocol == "pipe" or "::" in self.root:
            raise UserError(f"--data {self.root} is refused: give a folder or one of {', '.join(sorted(PROTOCOLS))}")
        self._connect()

    def _connect(self) -> None:
        # not of this object itself, which would then outlive its last use
        root = self.root
        self.files = lru_cache(maxsize=64)(lambda name: Places(Path(root, name)))
        self.process, self.system = os.getpid(), None
        self.fetched: dict[tuple[str, int], bytes] = {}
        if self.remote:
            import fsspec

            try:
                self.system, self.path = fsspec.core.url_to_fs(self.root)
            except (ImportError, ValueError) as error:
                raise UserError(f"--data {self.root} cannot be opened: {first_line(error)}") from error

    def __getstate__(self) -> dict:
        return {"root": self.root, "remote": self.remote}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._connect()

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Around requests: each process has connections of its own, and what a library raises becomes an `OSError`."""
        # a forked one has the systems of fsspec, but not the threads that serve them
        if self.process != os.getpid():
            self._connect()
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001
            raise OSError(errno.EIO, f"{type(error).__name__}: {first_line(error)}") from error

    def whole(self, name: str) -> bytes:
        with self.asked():
            return self.system.cat_file(f"{self.path}/{name}") if self.system else Path(self.root, name).read_bytes()

    def size(self, name: str) -> int:
        with self.asked():
            return self.system.size(f"{self.path}/{name}") if self.system else os.stat(Path(self.root, name)).st_size

    def fetch(self, places: Iterable[tuple[str, int, int]]) -> None:
        """Read ranges of remote files side by side, for the `read`s that follow; what fails is left for them to say."""
        names, offsets, sizes = zip(*places)
        paths, ends = [f"{self.path}/{name}" for name in names], [o + n for o, n in zip(offsets, sizes)]
        found = ()
        with suppress(OSError), self.asked():
            found = self.system.cat_ranges(paths, list(offsets), ends, on_error="return")
        self.fetched = {
            (name, offset): data for name, offset, data in zip(names, offsets, found) if isinstance(data, bytes)
        }

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer at the end of the file. Raises `BadImage` where it cannot be read."""
        if (name, offset) in self.fetched:
            return self.fetched[name, offset]
        try:
            with self.asked():
                if self.system:
                    return self.system.cat_file(f"{self.path}/{name}", start=offset, end=offset + size)
                return self.files(name).read(offset, size)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or type(error).__name__}", name) from error
