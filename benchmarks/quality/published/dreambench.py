"""DreamBench and DreamBench++ as they are distributed: pictures of subjects, and prompts that they shall be shown by.

DreamBench (Ruiz et al., arXiv 2208.12242; github.com/google/dreambooth, folder `dataset`):

    ROOT/prompts_and_classes.txt    lines "backpack_dog,backpack", then prompts "a {0} {1} in the jungle", for objects
    ROOT/backpack_dog/00.jpg        and for live subjects, where {0} is the subject's token and {1} its class

DreamBench++ (Peng et al., arXiv 2406.16855; github.com/yuangpeng/dreambench_plus, dreambench_plus_dataset.py):

    ROOT/images/live_subject/animal/00.jpg      one picture of each subject
    ROOT/captions/live_subject/animal/00.txt    first its name, then a prompt on each line
"""

import re
from dataclasses import dataclass
from pathlib import Path

from semantica.benchmarks.quality.published.figures import ENDINGS
from semantica.errors import UserError

LISTED = "prompts_and_classes.txt"
# classes whose subjects have the prompts of live ones
LIVE = ("cat", "dog")
PROMPT = re.compile(r"""['"](.*\{1\}.*)['"]\.format\(""")


@dataclass(frozen=True)
class Subject:
    """name: that of the folder of its generated pictures. pictures: real ones. prompts: without any token's name."""

    name: str
    pictures: tuple[Path, ...]
    prompts: tuple[str, ...]


def read_subjects(root: Path, names: tuple[str, ...] = ()) -> list[Subject]:
    """The subjects of either benchmark in natural order; names: which of them, by default all.

    Raises:
        UserError: neither benchmark lies there, a file that is none of it, a subject without pictures, or a name that
            is none.
    """
    for place in (root, root / "dataset", root / "data"):
        if (place / LISTED).is_file():
            found = dreambench(place)
            break
        if (place / "images").is_dir() and (place / "captions").is_dir():
            found = dreambench_plus(place)
            break
    else:
        raise UserError(f"{root} has neither {LISTED} nor images and captions: give the folder of DreamBench(++)")
    unknown = [name for name in names if name not in {subject.name for subject in found}]
    if unknown:
        raise UserError(f"--subjects {unknown[0]!r} is none of {root}, such as {found[0].name!r}: correct it")
    return [subject for subject in found if not names or subject.name in names]


def dreambench(root: Path) -> list[Subject]:
    path = root / LISTED
    classes: dict[str, str] = {}
    prompts: dict[str, list[str]] = {}
    kind = None
    for line in text(path):
        lower = line.lower()
        if lower.endswith("prompts") and lower != "prompts":
            kind = lower.removesuffix("prompts").strip()
        elif found := PROMPT.match(line):
            prompts.setdefault(kind, []).append(found[1])
        elif kind is None and line.count(",") == 1 and lower != "subject_name,class":
            name, _, said = line.partition(",")
            classes[name.strip()] = said.strip()
    if not classes or not {"object", "live subject"} <= prompts.keys():
        raise UserError(f"{path} lists no subjects, or no prompts of objects and live subjects: restore it")
    made = []
    for name, said in classes.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"{path} has a subject {name!r}: expected the name of a folder")
        own = prompts["live subject" if said in LIVE else "object"]
        # not by format, which would follow attributes
        shown = tuple(" ".join(prompt.replace("{0}", "").replace("{1}", said).split()) for prompt in own)
        made.append(Subject(name, pictures_of(root / name), shown))
    return made


def dreambench_plus(root: Path) -> list[Subject]:
    made = []
    for path in sorted((root / "captions").rglob("*.txt")):
        name, *prompts = text(path) or [""]
        if not prompts:
            raise UserError(f"{path} has no prompts: its first line is the subject, each further one a prompt")
        place = path.relative_to(root / "captions").with_suffix("")
        category = place.parent.name
        category = f"live_subject_{category}" if category in ("animal", "human") else category
        own = [root / "images" / place.with_suffix(ending) for ending in ENDINGS]
        pictures = tuple(picture for picture in own if picture.is_file())
        if not pictures:
            raise UserError(f"{path} has no picture at {own[1]}: restore it")
        # as that benchmark's own code names them
        made.append(Subject("_".join((category, place.name, name.lower().replace(" ", "_"))), pictures, tuple(prompts)))
    if not made:
        raise UserError(f"{root / 'captions'} holds no captions: give the folder of DreamBench++")
    return sorted(made, key=lambda subject: subject.name)


def text(path: Path) -> list[str]:
    """Lines that are not empty. Raises `UserError`."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text in UTF-8: restore it") from error


def pictures_of(folder: Path) -> tuple[Path, ...]:
    """Raises `UserError` for a subject without any."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    found = tuple(path for path in there if path.suffix.lower() in ENDINGS)
    if not found:
        raise UserError(f"{folder} holds no pictures of that subject: download the data set whole")
    return found
