"""What a server allows its clients."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """upload: bytes of one request. uploads: of all that are being received. pixels: of a picture, as its header says.

    images, steps: of one request. deadline: seconds until a request is answered, with images or without.
    patience: seconds that headers, an upload or the reading of a response may take. connections: open at a time.
    keys: one of which a request must bring; empty for none.
    """

    upload: int = 20 << 20
    uploads: int = 256 << 20
    pixels: int = 1 << 24
    images: int = 10
    steps: int = 100
    deadline: float = 60.0
    patience: float = 20.0
    connections: int = 256
    keys: tuple[str, ...] = ()
