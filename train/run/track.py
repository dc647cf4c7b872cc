"""A run's log in a tracker as well: Weights & Biases or trackio, which take the same calls."""

import importlib
from typing import Any

from semantica.errors import UserError, first_line

PROJECT = "semantica"


def begin(tracker: str, name: str, identity: str, config: dict[str, Any]) -> Any:
    """Begin a tracker's run, or continue the one of this identity; returns what has its `log` and `finish`.

    Args:
        tracker: "wandb" or "trackio": the package. Where it sends things, and as whom, is set as that package has it.
        name: what people see; identity: what makes it the same run after a restart. config: the run's options.

    Raises:
        UserError: the package is not there, or cannot begin (not logged in, no connection).
    """
    try:
        module = importlib.import_module(tracker)
    except ImportError as error:
        raise UserError(f"--track {tracker} needs that package ({error}): pip install {tracker}") from error
    # trackio knows a run by its name alone
    known = {"name": name, "id": identity} if tracker == "wandb" else {"name": f"{name}-{identity}"}
    try:
        return module.init(project=PROJECT, config=config, resume="allow", **known)
    # each has errors of its own
    except Exception as error:
        raise UserError(f"--track {tracker} cannot begin: {first_line(error)}") from error
