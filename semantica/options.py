"""Options of a command: a dataclass beside what it is for, filled from the command line."""

import contextlib
import io
import pkgutil
from dataclasses import dataclass
from typing import TypeVar

from semantica.errors import UserError

BOX = "│╭╮╰╯─"
Config = TypeVar("Config")


@dataclass(frozen=True)
class Verb:
    """A command, of which nothing is imported before it runs.

    help: one line. run: "module:function" of what `config` made; an int that it returns is the exit code.
    config: "module:Class", a dataclass of options; None where the function takes the arguments as they are.
    """

    help: str
    run: str
    config: str | None = None

    def __call__(self, name: str, arguments: list[str]) -> int:
        """Raises `UserError` as `parse`, and what the function raises."""
        given = arguments
        if self.config is not None:
            given = parse(pkgutil.resolve_name(self.config), name, arguments)
        code = pkgutil.resolve_name(self.run)(given)
        return code if isinstance(code, int) else 0


def parse(config: type[Config], verb: str, arguments: list[str]) -> Config:
    """Build a dataclass from a verb's arguments.

    Raises:
        UserError: an unknown option or an impossible value, in one line instead of the parser's box.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config, prog=f"semantica {verb}", args=arguments)
    except SystemExit as left:
        # 0 is after help
        if left.code != 2:
            raise
        words = "".join(" " if c in BOX else c for c in said.getvalue()).split()
        raise UserError(" ".join(words)) from left
