"""`semantica demo`: draw a data set, train on it, make variations of held-out pictures, measure, export, report."""

import json
import platform
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from semantica.errors import UserError
from semantica.files import write_json

STEPS, GROUPS = 1200, 240
CONDITIONS_PER_GROUP, VARIATIONS, SAMPLING_STEPS, GUIDANCE = 4, 4, 20, 4.0
# noise levels that the bundle is compared at; times each way to run the model is timed; what its images must reach
LEVELS, LATENCY_ROUNDS, LEAST_PSNR = 64, 3, 70.0
# of the model, as a web page
PAGE = "page/index.html"
# what a good run shows on held-out groups: (figure, lowest value, what it means)
GOALS = (
    ("loss_gain", 0.25, "denoising loss: right condition below a shuffled one"),
    ("on_topic", 0.70, "on-topic rate: nearest held-out picture is of the condition's group"),
    ("same_shape_in_grey", 0.50, "same shape, judged on grey values alone"),
    ("diversity", 0.60, "diversity, as a share of that among a group's real pictures"),
)


@dataclass(frozen=True)
class DemoConfig:
    """Draw a data set, train on it, make variations, export the model, write report.html and metrics.json.

    With --controls: draw scenes with captions, train on their words alone, and measure how far samples of held-out
    captions can be steered through attention; writes controls/controls.html and controls.json there.
    """

    out: Path = Path("demo")
    """Folder to write, for --controls one within; the same command continues or repeats a demo there."""
    controls: bool = False
    """Measure steering by attention instead of variations."""
    steps: int | None = None
    """Training steps; a few minutes' worth by default."""
    minutes: float | None = None
    """Instead of --steps: time for the whole demo, from which the steps follow by the speed of this machine."""
    groups: int = GROUPS
    """Groups of drawn pictures to train on; not with --controls."""
    compile: bool = True
    """Compile the training step; needs a working C++ compiler on a CPU."""
    seed: int = 0


def train_options(config: DemoConfig) -> dict:
    """What the demo trains with: settings for a few minutes on two cores."""
    return dict(
        data=config.out / "web" / "train", val=config.out / "web" / "val", out=config.out / "run",
        steps=config.steps, preset="tiny", conditioning="both", batch=32, lr=2e-3, warmup=40, decay=0.4, ema=0.99,
        loss="x", reference=16, align=0.05, flip=False, compile=config.compile, seed=config.seed, workers=1,
        eval_every=max(1, config.steps // 5), sample_every=config.steps, save_every=max(1, config.steps // 3),
    )  # fmt: skip


def demo(config: DemoConfig) -> dict:
    """Run the demo; returns the figures that metrics.json, or controls.json, holds.

    Raises:
        UserError: impossible options, or a folder that holds something else.
    """
    if config.controls:
        from semantica.benchmarks.quality.controls_demo import demo_controls

        if config.minutes is not None:
            raise UserError("--minutes is for pictures without captions: give --steps with --controls")
        if config.groups != GROUPS:
            raise UserError("--groups is for pictures without captions: leave it out with --controls")
        return demo_controls(config.out / "controls", config.steps, config.seed, config.compile)
    from semantica.benchmarks.quality.evaluate import EvaluateConfig, evaluate
    from semantica.benchmarks.quality.pace import announced, steps_before, steps_made, steps_within
    from semantica.benchmarks.quality.web import draw_web
    from semantica.memory import keep_freed_memory
    from semantica.train.config import TrainConfig
    from semantica.train.loop import train

    if (config.steps is not None and config.steps < 1) or config.groups < 1 or config.seed < 0:
        raise UserError("--steps and --groups must be at least 1, --seed at least 0")
    if config.minutes is not None and (config.steps is not None or not config.minutes > 0):
        raise UserError(f"--minutes {config.minutes:g}: give a time above 0, and no --steps beside it")
    keep_freed_memory()
    seconds = {}

    def timed(name: str, function, *arguments):
        began = time.perf_counter()
        result = function(*arguments)
        seconds[name] = time.perf_counter() - began
        return result

    print(f"1/5 drawing {config.groups} groups of pictures in {config.out / 'web'}")
    timed("draw", draw_web, config.out / "web", config.seed, config.groups)
    steps = config.steps or STEPS
    if config.minutes is not None:
        # a run that was begun goes on as it was
        steps = steps_before(config.out / "run")
        if steps is None:
            print("  measuring the speed of this machine")
            rehearsed = TrainConfig(**train_options(replace(config, steps=STEPS)))
            steps = timed("measure the speed", steps_within, config.minutes, rehearsed, sum(seconds.values()))
    config = replace(config, steps=steps)
    print(f"2/5 training {config.steps} steps in {config.out / 'run'}")
    pace = announced(config.steps, steps_made(config.out / "run"))
    run = timed("train", train, TrainConfig(**train_options(config)), pace)
    print("3/5 measuring variations of held-out pictures")
    settings = EvaluateConfig(
        data=config.out / "web" / "val", model=run, attributes=config.out / "web" / "attributes.json",
        out=config.out / "evaluation.json", conditions=16 * CONDITIONS_PER_GROUP, n=VARIATIONS,
        steps=SAMPLING_STEPS, guidance=GUIDANCE, seed=config.seed, device="cpu",
    )  # fmt: skip
    result = timed("evaluate", evaluate, settings)
    print(f"4/5 exporting to {config.out / 'bundle'}, and sampling the bundle beside the model")
    timed("export", export_bundle, config, run)
    engines = timed("sample the bundle", engines_beside_torch, config, run)
    in_browser = timed("web page", write_web_page, config)
    print("5/5 writing the report")
    timed("grid", draw_grid, config, run)
    metrics = {**result, "goals": goals(result)}
    write_json(config.out / "metrics.json", metrics)
    report(config, metrics, engines, seconds, in_browser)
    for goal in metrics["goals"]:
        mark = "reached" if goal["reached"] else "MISSED"
        print(f"  {goal['value']:6.1%}  (goal {goal['goal']:.0%}, {mark})  {goal['meaning']}")
    for row in engines:
        mark = "" if row["psnr_db"] is None else f"  {row['psnr_db']:.0f} dB to the pipeline's images"
        print(f"  {row['median_ms']:6.0f} ms for one picture, {SAMPLING_STEPS} guided steps: {row['engine']}{mark}")
    print(f"open {config.out / 'report.html'}")
    return metrics


def goals(result: dict) -> list[dict]:
    values = {**result["figures"]["model"], "loss_gain": result["loss"]["right_below_shuffled"]}
    return [
        {"figure": name, "value": values[name], "goal": goal, "reached": values[name] >= goal, "meaning": meaning}
        for name, goal, meaning in GOALS
    ]


def draw_grid(config: DemoConfig, run: Path) -> None:
    """grid.png: the first picture of each held-out group, then its variations; two groups a row."""
    from semantica.images import fit, grid, load_image, save_png
    from semantica.pipelines.sample import load_pipeline, variations
    from semantica.sampling.settings import Sampling
    from semantica.train.data.folders import scan

    data = scan(config.out / "web" / "val", "folders")
    pipeline = load_pipeline(run, "cpu")
    pictures = [load_image(data.root / members[0]) for members in data.groups.values()]
    made = variations(pipeline, pictures, 6, Sampling(SAMPLING_STEPS, guidance=GUIDANCE, seed=config.seed))
    size = pipeline.unet.config.image_size
    rows = [[fit(picture, size), *row] for picture, row in zip(pictures, made, strict=True)]
    save_png(grid(rows, apart=4), config.out / "grid.png")


def export_bundle(config: DemoConfig, run: Path) -> None:
    """The trained model as a bundle, in place of one that an earlier demo left."""
    from semantica.engines.bundle import is_bundle
    from semantica.export.config import ExportConfig
    from semantica.export.write import export

    out = config.out / "bundle"
    if is_bundle(out):
        shutil.rmtree(out)
    export(ExportConfig(run, out, levels=LEVELS, steps=SAMPLING_STEPS))


def write_web_page(config: DemoConfig) -> str:
    """The bundle as a page for browsers, in place of an earlier one; returns what the report says of it.

    A demo needs no network: where the page's runtime is not to be had, there is none, and the report says why.
    """
    from semantica.engines.bundle import open_bundle
    from semantica.export.web import write

    out = config.out / "page"
    if (config.out / PAGE).is_file():
        shutil.rmtree(out)
    try:
        write(open_bundle(config.out / "bundle"), out)
    except UserError as error:
        return f"There is no page this time: {error}"
    return f"Browsers open no scripts from files: python3 -m http.server -d {config.out}, then below its address:"


def engines_beside_torch(config: DemoConfig, run: Path) -> list[dict]:
    """engines.png: held-out pictures with torch's variations, then ONNX Runtime's, from the same noise.

    Returns a row for each way to run the model: `engine`, `arithmetic`, `median_ms` of one picture, `psnr_db` of the
    worst image to the pipeline's, None for the pipeline itself.

    Raises:
        ArtifactError: an image is less than `LEAST_PSNR` from the pipeline's.
    """
    import numpy as np

    from semantica import SemanticaPipeline
    from semantica.errors import ArtifactError
    from semantica.images import fit, grid, load_image, save_png
    from semantica.pipelines.sample import load_pipeline
    from semantica.solvers import noise
    from semantica.train.data.folders import scan

    data = scan(config.out / "web" / "val", "folders")
    pictures = [load_image(data.root / members[0]) for members in list(data.groups.values())[:4]]
    pipelines = {"PyTorch, the pipeline": load_pipeline(run, "cpu")}
    for backend, name in (("torch", "PyTorch, the bundle"), ("onnxruntime", "ONNX Runtime, the bundle")):
        pipelines[name] = SemanticaPipeline.from_bundle(config.out / "bundle", backend, "cpu")
    size = pipelines["PyTorch, the pipeline"].unet.config.image_size
    latents = noise(config.seed, (2 * len(pictures), 3, size, size))
    settings = dict(num_inference_steps=SAMPLING_STEPS, guidance_scale=GUIDANCE, output_type="np")
    made, times = {}, {name: [] for name in pipelines}
    for name, pipeline in pipelines.items():
        made[name] = pipeline(pictures, 2, latents=latents, **settings).images
    # in turn, so that a busy moment of the machine hits all alike
    for _ in range(LATENCY_ROUNDS):
        for name, pipeline in pipelines.items():
            began = time.perf_counter()
            pipeline(pictures[0], **settings)
            times[name].append(1e3 * (time.perf_counter() - began))
    first, *_, last = made
    squares = {name: float(np.square(images - made[first]).mean((1, 2, 3)).max()) for name, images in made.items()}
    psnr = {name: None if name == first else 10 * np.log10(1 / max(s, 1e-20)) for name, s in squares.items()}
    if psnr[last] < LEAST_PSNR:
        raise ArtifactError(f"{last} is {psnr[last]:.1f} dB from the pipeline's images: {LEAST_PSNR} are needed")
    shape = len(pictures), 2, size, size, 3
    shown = [(255 * made[name] + 0.5).astype(np.uint8).reshape(shape) for name in (first, last)]
    rows = [[fit(p, size), *shown[0][i], *shown[1][i]] for i, p in enumerate(pictures)]
    save_png(grid(rows, apart=4), config.out / "engines.png")
    arithmetic = {name: getattr(getattr(p, "engine", None), "arithmetic", "fp32") for name, p in pipelines.items()}
    return [
        {"engine": n, "arithmetic": arithmetic[n], "median_ms": float(np.median(times[n])), "psnr_db": psnr[n]}
        for n in pipelines
    ]


def report(config: DemoConfig, metrics: dict, engines: list[dict], seconds: dict[str, float], in_browser: str) -> None:
    """report.html: what ran, curves, the grid, engines, timings, figures."""
    import torch

    from semantica import __version__
    from semantica.report import Part, picture, plot, write_page

    rows = [json.loads(line) for line in (config.out / "run" / "metrics.jsonl").read_text().splitlines()]
    training = [r for r in rows if "loss" in r]
    held = [r for r in rows if "held_out_loss" in r]
    steps = [r["step"] for r in held]
    curves = {
        "training": ([r["step"] for r in training], [r["loss"] for r in training]),
        "held out, right condition": (steps, [r["held_out_loss"] for r in held]),
        "held out, shuffled condition": (steps, [r["held_out_loss_shuffled"] for r in held]),
    }
    names = sorted({name for row in metrics["figures"].values() for name in row}, key=lambda n: (n != "on_topic", n))
    figures = tuple(
        (name, *[f"{row[n]:.1%}" if n in row else "" for n in names]) for name, row in metrics["figures"].items()
    )
    speed = sorted(r["images_per_s"] for r in training)[len(training) // 2]
    facts = (
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}"),
        ("versions", f"semantica {__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
        ("training", f"{config.steps} steps of 32 pictures, {speed:.0f} pictures/s (median)"),
        ("waiting for data", f"{sum(r['data_wait'] for r in training) / len(training):.1%} of the step time"),
        ("model", f"denoiser and encoder cost {training[-1]['flops_per_image'] / 1e9:.2f} GFLOP a picture and step"),
        ("peak memory", f"{training[-1]['peak_memory_bytes'] / 2**30:.2f} GiB"),
        *((f"seconds to {name}", f"{value:.1f}") for name, value in seconds.items()),
    )
    made = [
        (g["meaning"], f"{g['value']:.1%}", f"{g['goal']:.0%}", "yes" if g["reached"] else "no")
        for g in metrics["goals"]
    ]
    about = (
        "A small model learned from pairs of drawn pictures that share a group, as pictures on a web page do: it sees "
        "one picture and makes others of the same content. The groups below were held out: each crosses a shape with "
        "a palette that training never showed together."
    )
    note = (
        "Each row: a held-out picture, then variations of it. The object's shape, count and palette should carry over; "
        "place, size and angle should not be copied."
    )
    write_page(
        config.out / "report.html",
        "Semantica demo: variations of pictures",
        [
            Part(text=about),
            Part("Variations of held-out pictures", note, True, png=picture(config.out / "grid.png"), alt="grid"),
            Part("Goals", columns=("figure on held-out groups", "value", "goal", "reached"), rows=tuple(made)),
            Part(
                "Figures beside baselines",
                f"{metrics['groups']} groups: chance is {metrics['chance']:.1%}. Real pictures are the ceiling.",
                True,
                columns=("", *[n.replace("_", " ") for n in names]),
                rows=figures,
            ),
            Part("Loss", svg=plot(curves, "step", "squared error of the image", log=True)),
            Part(
                "The exported bundle beside PyTorch",
                "Each row: a held-out picture, two variations by PyTorch, the same two by ONNX Runtime from the "
                "exported bundle and the same noise. The time is for one picture on this machine.",
                True,
                columns=("", "computes in", "milliseconds", "worst image, dB to the first row"),
                rows=tuple(
                    (
                        r["engine"],
                        r["arithmetic"],
                        f"{r['median_ms']:.0f}",
                        "" if r["psnr_db"] is None else f"{r['psnr_db']:.1f}",
                    )
                    for r in engines
                ),
                png=picture(config.out / "engines.png"),
                alt="a picture, PyTorch's variations, ONNX Runtime's variations",
            ),
            Part("The model in a browser", in_browser, True, link=PAGE if (config.out / PAGE).exists() else ""),
            Part("What ran", columns=("", ""), rows=facts),
        ],
        width=7 * 34 * 3,
    )
