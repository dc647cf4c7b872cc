"""Errors whose message is meant for the person at the keyboard."""


class UserError(ValueError):
    """A mistake in what the user asked for: one line saying what is wrong, with which value, and what to do.

    The command line prints the message and exits with code 2; library users catch it as a `ValueError`.
    """


class ArtifactError(RuntimeError):
    """Something that was made is not right, or could not be made; nothing of it is kept.

    The command line prints the message and exits with code 1.
    """


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
