"""`semantica bench dreambench`: pictures of subjects scored as DreamBench does, beside real pictures of them."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from semantica.benchmarks.harness.table import Column, cells, heads, show
from semantica.benchmarks.quality.evaluate_options import FEWEST_DRAWS
from semantica.benchmarks.quality.made import read_files
from semantica.benchmarks.quality.published.dreambench import Subject, read_subjects
from semantica.benchmarks.quality.published.figures import ENDINGS, shown, store, summed
from semantica.errors import UserError
from semantica.progress import phase

MADE, REAL = "generated", "real pictures"
# side at which an encoder is shown pictures; those of DINO and CLIP see this size
SIDE = 224
SAMPLE = re.compile(r"(\d+)_(\d+)")
COLUMNS = (
    Column("", "{row}"),
    Column("pictures", "{pictures}"),
    Column("encoder-I", lambda row, _: shown(row.get("encoder_i"))),
    Column("CLIP-I", lambda row, _: shown(row.get("clip_i"))),
    Column("CLIP-T", lambda row, _: shown(row.get("clip_t"))),
)


@dataclass(frozen=True)
class SubjectsConfig:
    """Score generated pictures of subjects on DreamBench (arXiv 2208.12242) or DreamBench++ (2406.16855): mean cosine
    between generated and real pictures of a subject, by an encoder such as DINO (DINO-I) and by CLIP (CLIP-I), and
    between pictures and their prompts (CLIP-T). Beside them real pictures, compared to the subject's other real ones
    and to its prompts, which they ignore. Each figure has a 95 % interval over subjects.
    """

    data: Path
    """Folder of DreamBench (prompts_and_classes.txt) or DreamBench++ (images and captions)."""
    images: Path
    """Generated pictures: SUBJECT/P_I.png is the I-th one of the subject's P-th prompt, both counted from 0."""
    features: str | None = None
    """Encoder that compares pictures, by hub name or folder, such as facebook/dino-vits16."""
    clip: Path | None = None
    """Local folder of a CLIP model (safetensors)."""
    subjects: tuple[str, ...] = ()
    """Which of the subjects; by default all."""
    out: Path | None = None
    """Where to write the figures as JSON; by default dreambench.json beside --images."""
    bootstrap: int = 200
    """How often subjects are drawn again for the intervals."""
    seed: int = 0
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"

    def check(self) -> "SubjectsConfig":
        """Raises `UserError` for impossible options."""
        if self.features is None and self.clip is None:
            raise UserError("nothing judges: give --features for an encoder, --clip for CLIP, or both")
        if self.bootstrap < FEWEST_DRAWS:
            raise UserError(f"--bootstrap is {self.bootstrap}: an interval needs at least {FEWEST_DRAWS} draws")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: give 0 or more")
        return self


@dataclass(frozen=True)
class Generated:
    """Pictures of one subject, and the number of each one's prompt."""

    paths: list[Path]
    prompts: np.ndarray


def score(config: SubjectsConfig) -> int:
    """Score, print and write; returns the exit code.

    Raises:
        UserError: a benchmark, an encoder or a CLIP model that is none; generated pictures that are missing.
    """
    from semantica.benchmarks.quality.metrics.judges import judge
    from semantica.benchmarks.quality.published.clip import Clip
    from semantica.device import pick_device

    config.check()
    subjects = read_subjects(config.data, config.subjects)
    made = generated(subjects, config.images)
    device = pick_device(config.device)
    encoder = None if config.features is None else judge(config.features, device)
    clip = None if config.clip is None else Clip(config.clip, device)
    values: dict[str, list[dict[str, np.ndarray]]] = {MADE: [], REAL: []}
    with phase(f"dreambench: {sum(len(one.paths) for one in made)} pictures", len(subjects)) as bar:
        for subject, own in zip(subjects, made, strict=True):
            both = compared(subject, own, encoder, clip)
            for name in values:
                values[name].append(both[name])
            bar.update()
    rows = {}
    for name, each in values.items():
        of = np.repeat(np.arange(len(each)), [len(next(iter(one.values()))) for one in each])
        joined = {key: np.concatenate([one[key] for one in each]) for key in each[0]}
        rows[name] = {"pictures": len(of), **summed(joined, of, config.bootstrap, config.seed)}
    show(heads(COLUMNS), cells(COLUMNS, [{"row": name, **row} for name, row in rows.items()]))
    settings = json.loads(json.dumps(asdict(config), default=str))
    judges = {"encoder": encoder and encoder.identity, "clip": clip and clip.identity}
    result = {"config": settings, **judges, "subjects": len(subjects), "rows": rows}
    store(config.out or config.images.absolute().parent / "dreambench.json", result)
    return 0


def generated(subjects: list[Subject], images: Path) -> list[Generated]:
    """The generated pictures of each subject; of DreamBench++ also where its own code writes them (`tgt_image`).

    Raises:
        UserError: a prompt of a subject has none, or a picture's name is of no prompt.
    """
    if not images.is_dir():
        raise UserError(f"--images {images} is not a folder: give that of the generated pictures")
    root = images / "tgt_image" if (images / "tgt_image").is_dir() else images
    found, missing = [], []
    for subject in subjects:
        folder, own = root / subject.name, []
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix.lower() not in ENDINGS:
                continue
            name = SAMPLE.fullmatch(path.stem)
            if not name or int(name[1]) >= len(subject.prompts):
                last = len(subject.prompts) - 1
                raise UserError(f"{path} is of no prompt: name it P_I, P from 0 to {last}, I counts its pictures")
            own.append((int(name[1]), path))
        lacking = sorted(set(range(len(subject.prompts))) - {prompt for prompt, _ in own})
        missing += [f"{subject.name}/{prompt}_0" for prompt in lacking]
        found.append(Generated([path for _, path in own], np.array([prompt for prompt, _ in own], np.int64)))
    if missing:
        raise UserError(
            f"{len(missing)} prompts have no picture in {root}, the first {missing[0]}: make them, or choose --subjects"
        )
    return found


def compared(subject: Subject, own: Generated, encoder, clip) -> dict[str, dict[str, np.ndarray]]:
    """Cosines of each generated and of each real picture of a subject; nan where there is nothing to compare with."""
    made: dict[str, np.ndarray] = {}
    real: dict[str, np.ndarray] = {}
    if encoder is not None:
        parts = (own.paths, subject.pictures)
        a, b = (directions(encoder.describe(read_files(Path(), list(paths), SIDE))) for paths in parts)
        made["encoder_i"], real["encoder_i"] = (a @ b.T).mean(1), to_others(b)
    if clip is not None:
        a, b, texts = clip.pictures(own.paths), clip.pictures(subject.pictures), clip.texts(subject.prompts)
        made["clip_i"], real["clip_i"] = (a @ b.T).mean(1), to_others(b)
        made["clip_t"], real["clip_t"] = (a * texts[own.prompts]).sum(1), (b @ texts.T).mean(1)
    return {MADE: made, REAL: real}


def directions(features: np.ndarray) -> np.ndarray:
    """Unit vectors `[N, F]`."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def to_others(vectors: np.ndarray) -> np.ndarray:
    """The mean cosine `[N]` of each of N unit vectors with the others."""
    count = len(vectors)
    if count < 2:
        return np.full(count, np.nan)
    return ((vectors @ vectors.T).sum(1) - 1) / (count - 1)
