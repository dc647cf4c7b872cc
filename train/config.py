"""Everything that a training run can be told, with the defaults a user would want."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.extras import literal_type_from_choices

from semantica.errors import UserError
from semantica.model.presets import PRESETS

FORMAT = 1
# settings that may change when a run is continued: none alters what a step computes, but for --steps with --decay
FREE = {
    "steps",
    "out",
    "data",
    "val",
    "tokens",
    "workers",
    "log_every",
    "save_every",
    "sample_every",
    "eval_every",
    "keep",
    "device",
    "parallel",
    "checkpointing",
    "checkpointing_keeps",
    "graph",
    "timeout",
    "track",
}
# shares that are dropped of one kind of condition, where there are both
APART = ("drop_picture", "drop_text")


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on pairs of pictures. The same command continues a run that was interrupted."""

    data: str
    """Folder of label folders with pictures (pictures that share a folder are pairs), or shards made by
    `semantica pairs`: a folder, or an fsspec URL such as s3://bucket/shards."""
    out: Path
    """Run folder to write; `semantica sample --model` reads it."""
    steps: int = 10_000
    """Optimizer steps in all."""
    preset: literal_type_from_choices(PRESETS) = "tiny"
    """Model size; the next options change parts of it."""
    patch_size: int | None = None
    """Pixels along a side that the first layer folds into channels."""
    channels: tuple[int, ...] = ()
    """Width of each convolutional level, from the highest resolution down. The transformer and its attention follow at
    half the resolution of the last: on a grid of image size / (patch size * 2 ** levels) along a side."""
    depths: tuple[int, ...] = ()
    """Residual blocks of each convolutional level, on either way."""
    width: int | None = None
    """Of the transformer."""
    depth: int | None = None
    """Blocks of the transformer."""
    heads: int | None = None
    """Attention heads of the transformer."""
    mode: Literal["auto", "folders", "pages", "reconstruct"] = "auto"
    """What a pair is: two pictures of one folder, two of one web page, or a picture and itself."""
    low: float | None = None
    """Smallest similarity (cosine) of a pair, for shards; `semantica pairs --report` shows what to choose."""
    high: float | None = None
    """Largest similarity (cosine) of a pair, for shards."""
    condition_on: Literal["picture", "text", "both"] = "picture"
    """What a target is conditioned on: another picture of its group, a text of its own, or both. Texts are lines
    {"file": path, "text": text} of captions.jsonl in --data (and --val), one of each picture's at random every time;
    of shards, the alternative texts that pages gave: pictures without one are no targets. Where texts say left or
    right, give --no-flip too."""
    conditions: int = 1
    """Pictures that each target is conditioned on."""
    image_size: int | None = None
    """Side of the images in pixels; the preset's own by default."""
    batch: int = 64
    """Samples per optimizer step, over all processes."""
    accumulate: int = 1
    """Parts that each batch is split into, to save memory; may change when a run without --align is continued."""
    encoder: str = "vit"
    """"vit" (small, trained along), or a frozen one: a DINOv2, CLIP or SigLIP by hub name or local folder, or the
    encoder of a run folder."""
    encoder_size: int | None = None
    """Side of the images that a frozen encoder sees."""
    encoder_tokens: Literal["patches", "all"] = "patches"
    """Tokens of a frozen encoder: patches only, or the class and register tokens too."""
    tokens: str | None = None
    """Folder of tokens that `semantica pairs --tokens` stored for --data with the same --encoder: it then never runs.
    Conditions are the centre of their pictures, mirrored at random like before; targets are cut as ever."""
    text_encoder: tuple[str, ...] = ("words",)
    """Frozen encoders of texts, each a stream of its own: "words" has a token for each word of the training texts,
    "phrases" one that knows the word before it too, which binds "red" to "cross" sooner; or a CLIP text tower, T5, UL2
    or ByT5 with its tokenizer, by hub name or folder, or in the folder of a diffusers pipeline; or those of a run
    folder."""
    conditioning: Literal["tokens", "global", "both", "none"] = "tokens"
    """How the condition enters: cross-attention to tokens, pooled vector, both, or not at all."""
    fusion: Literal["parallel", "concatenated"] = "parallel"
    """How several streams meet in cross-attention: "parallel", a softmax for each (arXiv 2409.13346), or, to compare
    with, "concatenated", one over the tokens of all. Their sum as one vector is --conditioning global."""
    drop: float = 0.1
    """Share of samples whose condition is dropped, pictures and text together, which makes guidance possible."""
    drop_picture: float = 0.1
    """With --condition-on both: share of samples that lose their pictures, whether or not they lose the text too."""
    drop_text: float = 0.1
    """With --condition-on both: share of samples that lose their text, whether or not they lose the pictures too."""
    drop_tower: float = 0.1
    """With several --text-encoder: share of samples that lose the text of one of them, each by itself."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    warmup: int = 200
    """Steps of linear warm-up."""
    decay: float = 0.0
    """Share of the steps at the end over which the learning rate falls linearly to zero."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.9999
    """Decay of the averaged weights that are published; lower in the first steps, unless these begin with --init."""
    ema_also: tuple[float, ...] = ()
    """Further decays: their averages are kept in checkpoints too, and published as the pipelines OUT/ema-DECAY."""
    init: str | None = None
    """Run folder or hub name of a published run whose weights this one begins with, with a new optimizer; of the same
    --preset, --image-size, --conditioning and kind of --encoder. Streams that it lacks begin by adding nothing."""
    lora: int = 0
    """Rank of LoRAs on self-attention and on cross-attention to texts (package peft): of --init's weights nothing else
    is trained, but streams that it lacks are, whole. They are merged into what is published. 0 = no LoRAs."""
    encoder_lr: float | None = None
    """Learning rate of the encoder of pictures, in the place of --lr. A frozen --encoder is trained along then."""
    loss: Literal["x", "v", "eps", "sigmoid"] = "x"
    """What the weight of the noise levels makes the loss equal to; "x" learns content first, "eps" and "v" detail."""
    align: float = 0.0
    """Weight of a contrastive loss between the encodings of a pair, for the encoder that is trained along."""
    repa: float = 0.0
    """Weight of representation alignment (REPA, arXiv 2410.06940; the paper's is 0.5): hidden states are drawn to a
    frozen encoder's tokens of the target. With --tokens it reads the target's, and so needs --crop centre."""
    repa_encoder: str | None = None
    """Frozen encoder that --repa aligns to, as for --encoder; by default --encoder, where that is frozen."""
    repa_depth: int | None = None
    """Transformer blocks before the states that --repa aligns; by default 2 of 7, the paper's share (8 of 28)."""
    reference: int = 64
    """Image size whose noise schedule is taken as it is; a smaller one means noisier training at every size."""
    scales: tuple[int, ...] = ()
    """Sides for the multi-scale loss, such as 32 64 128 256; empty = full size only."""
    flip: bool = True
    """Mirror pictures at random."""
    crop: Annotated[float | Literal["centre"], tyro.conf.arg(metavar="FLOAT|centre")] = 1.0
    """Smallest random crop, as a share of the shorter side; "centre" never crops at random."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """"auto" is bf16 autocast where the processor multiplies bf16 natively. "fp16" is for GPUs without bf16 (V100, T4):
    autocast with a scaled loss, where a step whose gradients overflow is skipped."""
    float8: bool = False
    """Multiply in float8 in the transformer (torchao; GPUs from Ada and Hopper on), with --compile."""
    compile: bool = False
    """torch.compile the network in place."""
    compile_scope: Literal["blocks", "network"] = "blocks"
    """What is compiled as one: each kind of repeated block, in seconds, or the whole step's forward and backward pass,
    in a minute or more for a few percent of speed, for models that each process holds whole."""
    graph: bool = False
    """On a GPU: record the forward and backward pass as one CUDA graph at the first step and replay it, for models so
    small that their kernels take longer to launch than to run. For one process."""
    checkpointing: bool = False
    """Compute the repeated blocks again in the backward pass instead of keeping their activations: less memory, up to
    a third more computing."""
    checkpointing_keeps: Literal["nothing", "products"] = "nothing"
    """What is kept of the blocks that --checkpointing computes again: "products" keeps results of matrix products,
    convolutions and attention, and computes only what is cheap again, for a part of the memory saved."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How several processes started by torchrun share the work: "ddp" copies the model to each, "fsdp" (FSDP2) splits
    weights, averages and optimizer state among them, "hsdp" among those of each node, with copies on the others.
    "auto" is ddp where there are several. It may change when a run is continued, and so may their number."""
    timeout: float = 600.0
    """Seconds after which a process that does not answer ends the run."""
    attention: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """Self-attention backend of diffusers' dispatcher, or "auto" for the best that works."""
    deterministic: bool = False
    """On a GPU: compute the same bits each time, also where a run is continued, for some speed. A CPU always does."""
    val: str | None = None
    """Folder or shards for held-out figures; by default groups or pages are held out of --data."""
    held_out: float = 0.05
    """Share of groups or pages held out where there is no --val; 0 = none."""
    seed: int = 0
    workers: int | None = None
    """Processes that load data; by default as many as the step can use, by a measurement at the start, as far as there
    are processors and shared memory."""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    track: Literal["none", "wandb", "trackio"] = "none"
    """Send the log to Weights & Biases or to trackio as well, set up as each of them has it; TensorBoard's and
    OUT/metrics.jsonl are always written."""
    log_every: int = 20
    save_every: int = 1000
    eval_every: int = 500
    sample_every: int = 1000
    keep: int = 2
    """Checkpoints to keep."""

    def check(self, processes: int = 1) -> "TrainConfig":
        """Raises `UserError` for impossible numbers."""
        every = ("log_every", "save_every", "eval_every", "sample_every")
        for name in ("steps", "batch", "accumulate", "conditions", "keep", *every):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least 1")
        self.check_sizes()
        if self.batch % self.accumulate:
            raise UserError(f"--batch {self.batch} cannot be split into --accumulate {self.accumulate} equal parts")
        if self.batch % (self.accumulate * processes):
            each = f"--batch {self.batch} in --accumulate {self.accumulate}"
            raise UserError(f"{each} parts cannot be split among {processes} processes: give a multiple of both")
        if self.compile_scope == "network":
            if not self.compile:
                raise UserError("--compile-scope network is nothing without --compile: give that too")
            if self.parallel in ("fsdp", "hsdp"):
                raise UserError("--compile-scope network is for processes that hold all weights: leave it out")
        if self.parallel in ("fsdp", "hsdp") and (self.float8 or self.precision == "fp16"):
            option = "--float8" if self.float8 else "--precision fp16"
            raise UserError(f"{option} is for processes that hold all weights: leave out --parallel {self.parallel}")
        if self.float8 and (not self.compile or self.precision not in ("auto", "bf16")):
            raise UserError("--float8 is slower than bf16 unless compiled, and goes with bf16: give --compile")
        if self.checkpointing_keeps != "nothing" and not self.checkpointing:
            raise UserError("--checkpointing-keeps is nothing without --checkpointing: give that too")
        if self.checkpointing_keeps != "nothing" and self.compile and self.compile_scope == "blocks":
            raise UserError("--checkpointing-keeps sees into no compiled block: give --compile-scope network too")
        if self.graph and (processes > 1 or self.parallel != "auto"):
            raise UserError("--graph is for one process: leave it out")
        if self.graph and self.checkpointing:
            # it keeps and sets states of random numbers, which a recording forbids
            raise UserError("--graph records no blocks that are computed again: leave out --checkpointing, or --graph")
        bounded = ("drop", "drop_picture", "drop_text", "drop_tower", "ema", "held_out", "decay")
        shares = [(name, 0, 1) for name in bounded]
        for name, low, high in shares + ([("crop", 1e-3, 1)] if self.crop != "centre" else []):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give {low} to {high}")
        decays = (self.ema, *self.ema_also)
        if len({*decays}) < len(decays) or not all(0 <= decay <= 1 for decay in decays):
            raise UserError(f"--ema-also is {' '.join(map(str, self.ema_also))}: give other decays than --ema, 0 to 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas is {' '.join(map(str, self.betas))}: give numbers from 0 to less than 1")
        for name in ("lr", "weight_decay", "align", "repa", "low", "high"):
            if not math.isfinite(getattr(self, name) or 0):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a finite number")
        for name in ("lr", "clip", "timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} is {getattr(self, name)}: give a positive number")
        if self.align < 0 or (self.align and self.encoder != "vit"):
            raise UserError(f"--align {self.align} needs the trainable encoder (--encoder vit) and a positive weight")
        if self.align and self.batch == self.accumulate:
            raise UserError(
                f"--align compares the pairs of a part with each other, and --batch {self.batch} in --accumulate "
                f"{self.accumulate} parts leaves one in each: give a smaller --accumulate or a larger --batch"
            )
        if not self.repa >= 0 or (not self.repa and (self.repa_encoder, self.repa_depth) != (None, None)):
            raise UserError(f"--repa is {self.repa}: give a positive weight, or no --repa-encoder and --repa-depth")
        if self.repa and self.encoder == "vit" and not self.repa_encoder:
            raise UserError("--repa aligns to a frozen encoder: give one as --encoder or as --repa-encoder")
        if self.repa_from_store and self.crop != "centre":
            raise UserError("--repa with --tokens reads what targets show at their centre: give --crop centre too")
        if self.tokens and self.encoder == "vit":
            raise UserError(f"--tokens {self.tokens} come from a frozen encoder: give the --encoder that made them")
        if self.encoder == "vit" and self.encoder_tokens != "patches":
            raise UserError("--encoder-tokens is for frozen encoders: the trainable one has patches only")
        if not self.text_encoder:
            raise UserError("--text-encoder is empty: give at least one, or leave it out")
        if self.condition_on == "picture" and self.text_encoder != TrainConfig.text_encoder:
            given = " ".join(self.text_encoder)
            raise UserError(f"--text-encoder {given} is nothing without --condition-on text or both")
        if self.condition_on == "text":
            self.check_text_alone()
        for name in APART if self.condition_on != "both" else ():
            if getattr(self, name) != getattr(TrainConfig, name):
                option = name.replace("_", "-")
                raise UserError(f"--{option} is for pictures and texts: leave it out, or give --condition-on both")
        self.check_adapters()
        if self.seed >= 1 << 32:
            raise UserError(f"--seed is {self.seed}: give less than {1 << 32}")
        if self.warmup < 0 or self.weight_decay < 0 or (self.workers or 0) < 0 or self.seed < 0:
            raise UserError("--warmup, --weight-decay, --workers and --seed must not be negative")
        return self

    def check_adapters(self) -> None:
        """Raises `UserError` for adapters of nothing, or of what cannot have them."""
        if self.lora < 0 or (self.lora and not self.init):
            raise UserError(f"--lora is {self.lora}: give a rank, and the run that it adapts as --init")
        if self.lora and (self.float8 or self.compile or self.parallel in ("fsdp", "hsdp")):
            raise UserError("--lora is for weights in their own type, whole and uncompiled: leave out --float8, "
                            "--compile and --parallel fsdp or hsdp")  # fmt: skip
        if self.encoder_lr is None:
            return
        if not (math.isfinite(self.encoder_lr) and self.encoder_lr > 0):
            raise UserError(f"--encoder-lr is {self.encoder_lr}: give a positive number")
        if not self.pictures or self.tokens:
            what = "--tokens, which no encoder runs for" if self.tokens else "--condition-on text"
            raise UserError(f"--encoder-lr trains the encoder of pictures: leave out {what}")

    def check_sizes(self) -> None:
        """Raises `UserError` for sizes of a network that none has."""
        least = dict.fromkeys(("patch_size", "channels", "width", "depth", "heads", "image_size", "encoder_size"), 1)
        for name, smallest in (least | {"depths": 0}).items():
            given = getattr(self, name)
            if any(size < smallest for size in (given if isinstance(given, tuple) else (given,)) if size is not None):
                said = " ".join(map(str, given)) if isinstance(given, tuple) else given
                raise UserError(f"--{name.replace('_', '-')} is {said}: give at least {smallest}")

    def check_text_alone(self) -> None:
        """Raises `UserError` for options of pictures where these condition nothing."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("conditions", "encoder", "encoder_size", "encoder_tokens", "align"):
            if getattr(self, name) != defaults[name]:
                option = name.replace("_", "-")
                raise UserError(f"--{option} is for pictures as conditions: leave it out, or give --condition-on both")

    @property
    def pictures(self) -> int:
        """That each target is conditioned on; 0 for texts alone."""
        return 0 if self.condition_on == "text" else self.conditions

    @property
    def texts(self) -> bool:
        """Whether texts condition."""
        return self.condition_on != "picture"

    @property
    def repa_from_store(self) -> bool:
        """Whether the tokens that hidden states are aligned to are among the stored ones."""
        return bool(self.repa and self.tokens and self.repa_encoder in (None, self.encoder))

    def record(self) -> dict:
        """As JSON values."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Warm-up, plateau, linear decay: a pure function of the step (0 is the first)."""
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    tail = config.decay * config.steps
    fall = min(1.0, (config.steps - step) / tail) if tail >= 1 else 1.0
    return config.lr * min(rise, fall)


def ema_decay(config: TrainConfig, step: int, decay: float | None = None) -> float:
    """Of --ema, or of another decay: short memory at first, so that a random start is forgotten, which is
    min(decay, (1 + step) / (10 + step))."""
    decay = config.ema if decay is None else decay
    return decay if config.init else min(decay, (1 + step) / (10 + step))
