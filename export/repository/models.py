"""What `config.pbtxt` says of each model of a repository, as messages of Triton's schema."""

from collections.abc import Sequence
from typing import Any

from semantica import __version__
from semantica.export.repository.graphs import Plans, Port, Ports
from semantica.export.repository.pbtxt import Name, mapped

# a request waits so long for others to join it; a run takes many times that, even of few steps on a GPU
DELAY_US = 2000
# requests that may wait for each place in a batch; more are refused at once (UNAVAILABLE, HTTP 503)
WAITING = 16
# how long it may wait, ten minutes, where its client does not say less: without a bound of the server's own, Triton
# heeds none of its clients'
PATIENCE_US = 600_000_000
# processes of the loop: one prepares and answers while the models work for the other
LOOPS = 2
# steps of a request: a mistyped number must not hold the server for hours, or all of its memory
MOST_STEPS = 1000


def base(name: str, ports: Ports, most: int, optional: Sequence[str] = ()) -> dict[str, Any]:
    """What all have: names, types and dimensions, and which versions are served."""
    return {
        "name": name,
        "max_batch_size": most,
        "input": [described(p, most) | ({"optional": True} if p.name in optional else {}) for p in ports.inputs],
        "output": [described(port, most) for port in ports.outputs],
        "version_policy": {"latest": {"num_versions": 1}},
    }


def described(port: Port, most: int) -> dict[str, Any]:
    """An input or output. Triton has no dimensions of none: what has none beside the batch comes as `[B, 1]`, and a
    scalar of a model that does not batch as `[1]`, which the backend of ONNX Runtime knows how to take."""
    made = {"name": port.name, "data_type": Name(f"TYPE_{port.type}"), "dims": list(port.dims) or [1]}
    return made | ({"reshape": {}} if most and not port.dims else {})


def texts(**values: str) -> list[dict[str, Any]]:
    """Parameters of a model."""
    return mapped({name: {"string_value": value} for name, value in values.items()})


def instances(count: int, kind: str) -> list[dict[str, Any]]:
    return [{"count": count, "kind": Name(kind)}]


def warmup(ports: Ports, batches: Sequence[int], files: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Requests of zeros that are answered before the model is ready, one for each size of batch.

    files: inputs that are read from files of their name instead.
    """
    zeros = {
        port.name: {"data_type": Name(f"TYPE_{port.type}"), "dims": [abs(dim) for dim in port.dims] or [1]}
        | ({"input_data_file": port.name} if port.name in files else {"zero_data": True})
        for port in ports.inputs
    }
    return [{"name": f"batch of {size}", "batch_size": size, "inputs": mapped(zeros)} for size in batches]


def graph(name: str, ports: Ports, most: int, usual: int, kind: str, plans: Plans | None, files: dict) -> dict:
    """A model that is a graph of the bundle; ports without the batch.

    Its queue joins what waits while it works, such as steps of runs with other settings, and waits for nothing: the
    loop stands still meanwhile. usual: batch of one image. files: of TensorRT engines by compute capability.
    """
    if plans:
        served = {
            "platform": "tensorrt_plan",
            "cc_model_filenames": mapped(files),
            "optimization": {"cuda": {"graphs": True, "graph_spec": recorded(usual, most)}},
            "parameters": texts(semantica=__version__, tensorrt=", ".join(plans.versions)),
        }
    else:
        served = {"backend": "onnxruntime", "default_model_filename": "model.onnx"}
        served["parameters"] = texts(semantica=__version__)
    return {
        **base(name, ports, most),
        **served,
        "instance_group": instances(1, kind),
        "dynamic_batching": together(most),
        "model_warmup": warmup(ports, sorted({usual, most})),
    }


def recorded(usual: int, most: int) -> list[dict[str, int]]:
    """Batches that are recorded as CUDA graphs: those of 1, 2, 4, ... images, and the largest."""
    sizes = {usual * 2**i for i in range(most.bit_length()) if usual * 2**i <= most}
    return [{"batch_size": size} for size in sorted({*sizes, most})]


def together(most: int) -> dict[str, Any]:
    """Batches of as many as wait: a smaller size among the preferred would part what could run at once."""
    return {"preferred_batch_size": [most]}


def variations(name: str, ports: Ports, most: int, kind: str, models: dict[str, str]) -> dict[str, Any]:
    """The sampling loop, in Python, over the models of the graphs.

    It is not warmed up: it calls the other models, which may be loaded after it.
    """
    return {
        **base(name, ports, most, optional=("noise", "seed", "steps", "guidance")),
        "backend": "python",
        "instance_group": instances(LOOPS, kind),
        "dynamic_batching": {
            **together(most),
            "max_queue_delay_microseconds": DELAY_US,
            "default_queue_policy": {
                "timeout_action": Name("REJECT"),
                "default_timeout_microseconds": PATIENCE_US,
                "allow_timeout_override": True,
                "max_queue_size": WAITING * most,
            },
        },
        "parameters": texts(semantica=__version__, max_steps=str(MOST_STEPS), **models),
    }


def one_file(name: str, ports: Ports, kind: str) -> dict[str, Any]:
    """The whole run as one graph. It does not batch: steps and guidance are one number each for all images of a call.

    ports: with the batch, which the client chooses.
    """
    return {
        **base(name, ports, 0),
        "backend": "onnxruntime",
        "default_model_filename": "model.onnx",
        "parameters": texts(semantica=__version__),
        "instance_group": instances(1, kind),
        "model_warmup": warmup(ports, [1], files=("steps", "guidance")),
    }
