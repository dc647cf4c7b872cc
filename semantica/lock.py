"""One run at a time in a folder: a lock of the operating system, which is gone with the process that held it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from semantica.errors import UserError

try:
    import fcntl
except ImportError:
    # Windows has no such locks
    fcntl = None

# descriptors of the files that this process holds
HELD: set[int] = set()


@contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold a lock on a file, which is made for it and gone afterwards; nothing is held where the system, or its file
    system, has no locks.

    Raises:
        UserError: with the words of `taken`: somebody else holds it, in this process or another.
        OSError: the file cannot be made.
    """
    descriptor = opened(path)
    while not (free := alone(descriptor)) or not there(descriptor, path):
        close(descriptor)
        if not free:
            raise UserError(taken)
        # who held it until now has removed the file that was opened
        descriptor = opened(path)
    try:
        yield
    finally:
        # not by a forked process, to which it never belonged
        if descriptor in HELD:
            # before it is let go, so that nobody locks a file that is about to vanish
            with suppress(OSError):
                path.unlink()
            close(descriptor)


def held(path: Path) -> bool:
    """Whether somebody holds a lock on a file now, in another process or this one; no file is made."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not alone(descriptor)
    finally:
        os.close(descriptor)


def opened(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    HELD.add(descriptor)
    return descriptor


def close(descriptor: int) -> None:
    HELD.remove(descriptor)
    os.close(descriptor)


def alone(descriptor: int) -> bool:
    """Whether nobody else holds the lock, which then is held here."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # of a file system without locks
    except OSError:
        pass
    return True


def there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def let_go() -> None:
    """In a forked process: workers outlive a parent that was killed, and must hold nothing of it."""
    for descriptor in HELD:
        os.close(descriptor)
    HELD.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=let_go)
