"""Repositories of the hub: which folder one is, downloaded where it has to be, and of it only what is read."""

from collections.abc import Iterable
from pathlib import Path

from semantica.errors import UserError


def located(source: str | Path, files: Iterable[str], revision: str | None = None) -> Path:
    """The folder itself, or that of a repository on the hub, downloaded.

    files: patterns of what is read of it.

    Raises:
        UserError: the repository cannot be reached.
    """
    folder = Path(source)
    if folder.exists() or len(folder.parts) != 2 or folder.is_absolute():
        return folder

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=[*files]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{source} is neither a folder nor a repository that can be reached") from error
