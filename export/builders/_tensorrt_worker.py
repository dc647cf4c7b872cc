"""Builds one TensorRT engine; a process of its own, because the builder can crash: python -m ... REQUEST.json."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

from semantica import cache


def histogram(network) -> dict[str, dict[str, int]]:
    """Layer type -> element type of its result -> how many."""
    table: dict[str, Counter] = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for j in range(layer.num_outputs):
            dtype = str(layer.get_output(j).dtype).rpartition(".")[2]
            table.setdefault(str(layer.type).rpartition(".")[2], Counter())[dtype] += 1
    return {kind: dict(counts) for kind, counts in sorted(table.items())}


def build(trt: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """Parse a graph, build an engine, write it; returns what is known of it, or {"error": reason}.

    request: `onnx`, `engine`: paths; `arch`: "sm_89", or None for the GPU that is here; `profile`: min, opt, max batch;
        `timings`: file where measured kernels are kept from build to build, or None; `refittable`: whether the engine
        is to take other weights later; `layers`: file for what the engine inspector says of the finished engine, or
        None, since that takes the GPU.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder, keep, inspect = trt.Builder(logger), request["timings"], request["layers"]
    flags = trt.NetworkDefinitionCreationFlag
    # always so in TensorRT 11, which may drop the flag
    strong = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(strong)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        return {"error": "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))[:500]}
    config = builder.create_builder_config()
    # so that the inspector can name the types that each layer was given
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["refittable"]:
        config.set_flag(trt.BuilderFlag.REFIT)
    if keep is not None:
        # another card's or version's is refused, and made anew
        timings = config.create_timing_cache(cache.read(Path(keep))) or config.create_timing_cache(b"")
        if not config.set_timing_cache(timings, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)
    if request["arch"] is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, request["arch"].replace("sm_", "SM")), 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        fixed = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, *((request["profile"][key], *fixed) for key in ("min", "opt", "max")))
    config.add_optimization_profile(profile)
    layers = histogram(network)
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        return {"error": "the builder gave no engine", "layers": layers}
    Path(request["engine"]).write_bytes(bytes(blob))
    if keep is not None:
        made = config.get_timing_cache()
        # what another process has measured meanwhile stays known
        other = config.create_timing_cache(cache.read(Path(keep)))
        if other:
            made.combine(other, False)
        cache.write(Path(keep), bytes(made.serialize()))
    if inspect is not None:
        engine = trt.Runtime(logger).deserialize_cuda_engine(bytes(blob))
        information = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        Path(inspect).write_text(information)
    return {"layers": layers, "backend_version": trt.__version__}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    asked = json.loads(place.read_text())
    result = build(importlib.import_module(asked["module"]), asked)
    place.with_suffix(".result").write_text(json.dumps(result))
