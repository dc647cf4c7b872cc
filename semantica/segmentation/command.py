"""`semantica segment`: what of a picture belongs to which of some named classes, from the command line."""

from dataclasses import dataclass
from pathlib import Path

from semantica.errors import UserError
from semantica.images import load_image, save_png


@dataclass(frozen=True)
class SegmentConfig:
    """Say for each pixel of a picture to which of some named classes it belongs (CAT-Seg, arXiv 2303.11797).

    Writes a PNG of 8 bits whose values are numbers of classes, in the order that they are given, 255 where there is
    none, and a legend beside it as JSON.
    """

    model: Path
    """Folder made by `semantica train-segmenter` or `semantica convert-segmenter`."""
    image: Path
    """The picture, of any size."""
    classes: str
    """Their names with commas between, such as "cat, dog, grass"; any number, any words."""
    out: Path = Path("masks.png")
    """A .png; the legend has the same name in .json."""
    overlay: Path | None = None
    """A .png of the picture with the classes drawn over it."""
    threshold: float = 0.0
    """Leave pixels empty whose likeliest class is less likely than this, 0 to 1; by default each has a class."""
    windows: bool = False
    """Look at overlapping windows too, for more detail; by default at the whole picture alone."""
    scale: float = 5 / 3
    """Of --windows: the picture's shorter side as a multiple of a window's, 1 to 8."""
    device: str = "auto"

    def check(self) -> "SegmentConfig":
        """Raises `UserError` for options that say nothing, or a place that is taken."""
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold:g}: give a probability, 0 to 1")
        taken = {"--image": self.image.resolve()}
        for name, path in (("--out", self.out), ("--overlay", self.overlay)):
            if path is None:
                continue
            if path.suffix != ".png" or path.is_dir():
                raise UserError(f"{name} {path} is no name that ends in .png: give one")
            for other, place in taken.items():
                if path.resolve() == place:
                    raise UserError(f"{name} {path} is {other} too: give another name")
            taken[name] = path.resolve()
        return self

    @property
    def names(self) -> list[str]:
        """Raises `UserError` where there is no class, or one twice."""
        names = [" ".join(name.split()) for name in self.classes.split(",")]
        if not any(names):
            raise UserError('--classes is empty: give names with commas between, such as "cat, dog, grass"')
        if "" in names or len(set(names)) < len(names):
            odd = "" if "" in names else next(name for name in names if names.count(name) > 1)
            raise UserError(f"--classes has {odd!r} {'as a name' if not odd else 'twice'}: give each class one name")
        return names


def run(config: SegmentConfig) -> None:
    """Write masks, legend and overlay.

    Raises:
        UserError: the picture or the model cannot be used, or a class has no words; nothing is written then.
    """
    names, picture = config.check().names, load_image(config.image)

    from semantica.device import pick_device
    from semantica.segmentation.segmenter import load_segmenter
    from semantica.segmentation.shown import overlay, write_masks
    from semantica.segmentation.windows import Windows, segment

    windows = Windows(config.scale) if config.windows else None
    segmenter = load_segmenter(config.model).to(pick_device(config.device))
    owner = segment(segmenter, picture, names, windows, config.threshold)
    legend = write_masks(owner, names, config.out)
    if config.overlay is not None:
        save_png(overlay(picture, owner, names), config.overlay)
    for row in sorted(legend, key=lambda row: -row["share"]):
        print(f"{row['share']:7.1%}  {row['name']}")
    if empty := float((owner < 0).mean()):
        print(f"{empty:7.1%}  (none)")
    print(config.out)
