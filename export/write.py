"""`semantica export`: a run folder becomes a bundle, or nothing does."""

import gc
import importlib.util
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from semantica import __version__
from semantica.engines import bundle
from semantica.engines.bundle import CONDITION, DECODE, DENOISE, FOR_ONNX_RUNTIME, MANIFEST, NULL, REFERENCE, WEIGHTS
from semantica.errors import UserError
from semantica.export.config import ExportConfig
from semantica.files import aside_of, entries, written
from semantica.lock import locked
from semantica.pipelines.kinds import foreign
from semantica.progress import phase

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(config: ExportConfig) -> Path:
    """Write a bundle whose graphs agreed with the fp32 network; returns where it is.

    Raises:
        UserError: impossible options, no usable run folder, or a missing package; nothing is written then.
        ArtifactError: an artifact computes something else than the network; nothing is kept.
    """
    config.check()
    check_packages()
    return write(config, load(config))


def check_packages() -> None:
    """Raises `UserError` where a package that export needs is missing."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        how = 'pip install "semantica-diffusion[export]"'
        raise UserError(f"export needs {', '.join(absent)}, not installed here: {how}")


def write(config: ExportConfig, pipeline) -> Path:
    """`export` of a pipeline in fp32 that is there already; what the configuration says of the model's parts is not
    read again, but for its tokenizers."""
    from semantica.export.gate import Gate
    from semantica.export.program import capture

    latent = hasattr(pipeline, "vae")
    began = time.perf_counter()
    with new_folder(config.out) as folder:
        with phase("export: the model's programs"):
            captured = capture(pipeline.unet, pipeline.encoder, config.precision)
        autoencoder = None
        if latent:
            from semantica.export.foreign import copy_tokenizers, decoder
            from semantica.export.foreign import describe as describe_foreign

            manifest = describe_foreign(config, pipeline, captured)
            autoencoder, manifest["decoder"] = decoder(pipeline, config.precision)
            copy_tokenizers(config, manifest, folder)
        else:
            manifest = describe(config, pipeline, captured)
            save_tokenizers(pipeline, manifest, folder)
        with phase("export: graphs and weights"):
            manifest |= write_graphs(captured, folder, autoencoder)
        manifest["files"] = entries(folder, contents(folder))
        (folder / MANIFEST).write_text(json.dumps(manifest | {"parity": {}}, indent=1))
        schedule = pipeline.scheduler if latent else pipeline.scheduler.schedule
        compared = captured.sizes, folder, config.levels, config.steps, pipeline.decode if latent else None
        gate = Gate(pipeline.unet, pipeline.encoder, schedule, *compared)
        with phase(f"export: compare {config.precision} with the network at {config.levels} noise levels"):
            manifest |= gate.program(captured)
        # the files hold the weights now, and engines will hold them once more
        captured, autoencoder = captured.without_programs(), None
        # programs refer to themselves in circles
        gc.collect()
        with phase("export: compare the files with the network"):
            manifest |= gate.files(captured)
        manifest["files"] |= entries(folder, [REFERENCE])
        manifest["seconds"] = round(time.perf_counter() - began, 1)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for name, row in manifest["parity"].items():
        print(f"{name}: v max error {row['v_max_error']:.2g}, images {row['psnr_db']:.1f} dB, in {row['arithmetic']}")
    print(f"{config.precision} bundle in {config.out}, {manifest['seconds']} s")
    return config.out


def load(config: ExportConfig):
    """The pipeline of a run folder, or of a folder of diffusers, in fp32. Raises `UserError` for one of no bundle."""
    if not foreign(config.model):
        for option, given in (("ip-adapter", config.ip_adapter), ("lora", config.lora)):
            if given is not None:
                raise UserError(f"--{option} goes with the folder of a diffusers pipeline, {config.model} is none")
        from semantica.pipelines.variations import SemanticaPipeline

        return SemanticaPipeline.from_pretrained(config.model)
    from semantica.export.rebuild import ENCODERS
    from semantica.pipelines.unets import UNetPipeline

    pipeline = UNetPipeline.load(config.model, config.ip_adapter, config.ip_scale, config.lora, config.lora_scale)
    for part in pipeline.encoder.encoders.values():
        if type(part).__name__ not in ENCODERS:
            raise UserError(f"{config.model} reads {type(part).__name__}, which no bundle has yet: sample the folder")
    return pipeline


def contents(folder: Path) -> list[str]:
    """Every file of a folder, by its name from there."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder that takes the name `out` at the end, and is gone after any failure.

    Raises:
        UserError: the place cannot be written to, was taken meanwhile, or another process is making the same.
    """
    taken = f"another process makes {out}: wait for it, or choose another name"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(aside_of(out, "lock"), taken), written(out, existing="refuse") as folder:
            folder.mkdir()
            yield folder
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; give a place with room") from error


def describe(config: ExportConfig, pipeline, captured) -> dict:
    """What the manifest says about the model."""
    from semantica.model.conditioner import encoders_of, to_plain

    unet, encoders = pipeline.unet.config, encoders_of(pipeline.encoder)
    inputs = {"inputs": {name: list(part.input_shape) for name, part in encoders.items()}}
    side = next((part.image_size for part in encoders.values() if hasattr(part, "image_size")), 0)
    heads = unet.heads if captured.sizes else 0
    return {
        "format": bundle.FORMAT,
        "version": bundle.VERSION,
        "semantica": __version__,
        "precision": config.precision,
        "streams": dict(zip(pipeline.unet.stream_names, captured.sizes)),
        "shapes": {
            "image": side,
            "latent": unet.image_size,
            "channels": unet.in_channels,
            "blocks": unet.depth if captured.sizes else 0,
            "heads": heads,
            "head_dim": unet.width // unet.heads if captured.sizes else 0,
            "emb": unet.emb_dim,
        },
        "model": {name: to_plain(getattr(pipeline, name)) for name in ("unet", "encoder", "scheduler")},
        **sights(encoders),
        # pictures alone go without saying
        **(inputs if len(encoders) > 1 or not side else {}),
    }


def sights(encoders: dict) -> dict[str, dict]:
    """How each encoder sees a picture, where that is not its whole middle square, resized by a bicubic filter."""
    seen = {name: part.sight for name, part in encoders.items() if hasattr(part, "sight")}
    named = {name: sight._asdict() for name, sight in seen.items() if sight.interpolation is not None}
    return {"sight": named} if named else {}


def save_tokenizers(pipeline, manifest: dict, folder: Path) -> None:
    """The tokenizers of encoders that have one, into a bundle and its manifest."""
    from semantica.model.conditioner import encoders_of

    for name, part in encoders_of(pipeline.encoder).items():
        if hasattr(part, "tokenizer"):
            place = f"tokenizer_{name}"
            (folder / place).mkdir()
            part.tokenizer.save(folder / place)
            manifest.setdefault("tokenizers", {})[name] = [place]


def write_graphs(captured, folder: Path, autoencoder=None) -> dict:
    """The graphs, in ONNX Runtime's form too where that is another, the weights and the null condition.

    autoencoder: where the network samples latents, the module and the program that decodes them.
    """
    from safetensors.torch import save_file

    from semantica.export import onnx as graph
    from semantica.export.onnx_runtime import with_layer_norms

    modules, null = {"unet": captured.unet, "encoder": captured.encoder}, captured.unet.null(1)
    names = [f"{kind}.{i}" for i in range(len(null.keys)) for kind in "kv"]
    programs = [
        (CONDITION, captured.encode, captured.inputs, [*names, "emb"]),
        (DENOISE, captured.denoise, ["z", "logsnr", *names, "emb"], ["v"]),
    ]
    if autoencoder is not None:
        modules["vae"], program = autoencoder
        programs.append((DECODE, program, ["latents"], ["images"]))
    weights, made = graph.write_weights(modules, folder / WEIGHTS), {}
    for name, program, inputs, outputs in programs:
        model = graph.to_onnx(program, inputs, outputs, set(weights))
        graph.save(model, folder / name, weights, folder / WEIGHTS)
        made[name] = {"nodes": graph.node_counts(model), "types": graph.types(model)}
        if with_layer_norms(model):
            graph.save(model, folder / FOR_ONNX_RUNTIME[name], weights, folder / WEIGHTS)
    arrays = {"emb": null.emb}
    for i, (key, value) in enumerate(zip(null.keys, null.values)):
        arrays |= {f"k.{i}": key.transpose(1, 2), f"v.{i}": value.transpose(1, 2)}
    save_file({name: array.detach().contiguous() for name, array in arrays.items()}, folder / NULL)
    return {"opset": graph.OPSET, "graphs": made}
