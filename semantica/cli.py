"""The `semantica` command: a table of verbs, each imported only when it runs."""

import io
import os
import sys
from collections.abc import Callable

from semantica import __version__
from semantica.errors import ArtifactError, UserError, device_failure
from semantica.options import Verb

VERBS: dict[str, Verb] = {}


def register_verb(name: str, help: str, run: str, config: str | None = None) -> None:
    """Add a verb to the command; see `semantica.options.Verb`."""
    VERBS[name] = Verb(help, run, config)


register_verb(
    "doctor",
    "what is installed, and which implementation each operator uses",
    "semantica.doctor:run",
    "semantica.doctor:DoctorConfig",
)
register_verb(
    "demo",
    "draw a data set, train on it, make variations, write a report",
    "semantica.benchmarks.quality.demo:demo",
    "semantica.benchmarks.quality.demo:DemoConfig",
)
register_verb(
    "pairs",
    "find the pictures that share a web page: crawls in, training data out",
    "semantica.train.pages.command:run",
    "semantica.train.pages.command:PairsConfig",
)
register_verb(
    "train",
    "train a model on pairs of pictures, or continue a run",
    "semantica.train.command:run",
)
register_verb(
    "sample",
    "make variations of pictures",
    "semantica.pipelines.sample:sample",
    "semantica.pipelines.sample:SampleConfig",
)
register_verb(
    "edit",
    "change a picture from one condition to another",
    "semantica.editing.command:edit",
    "semantica.editing.command:EditConfig",
)
register_verb(
    "segment",
    "say which parts of a picture are what, by names of your choice",
    "semantica.segmentation.command:run",
    "semantica.segmentation.command:SegmentConfig",
)
register_verb(
    "train-segmenter",
    "train the model of segment on pictures and masks, or continue a run",
    "semantica.train.segmentation.loop:train_segmenter",
    "semantica.train.segmentation.config:TrainSegmenterConfig",
)
register_verb(
    "convert-segmenter",
    "published weights of CAT-Seg as a model of segment",
    "semantica.segmentation.convert:convert",
    "semantica.segmentation.convert:ConvertConfig",
)
register_verb(
    "export",
    "turn a run into a bundle of ONNX graphs, checked against the network, or into one file that samples",
    "semantica.export.products:run",
    "semantica.export.products:ProductsConfig",
)
register_verb(
    "quantise",
    "turn a bundle into one whose denoiser multiplies int8 numbers",
    "semantica.export.quantise:quantise",
    "semantica.export.config:QuantiseConfig",
)
register_verb(
    "build",
    "build TensorRT or AOTInductor engines from a bundle",
    "semantica.export.build:build",
    "semantica.export.config:BuildConfig",
)
register_verb(
    "serve",
    "an HTTP server that clients of OpenAI's image API can use",
    "semantica.serving.command:serve",
    "semantica.serving.command:ServeConfig",
)
register_verb(
    "evaluate",
    "figures for a run, or for a folder of pictures made elsewhere",
    "semantica.benchmarks.quality.evaluate:evaluate",
    "semantica.benchmarks.quality.evaluate:EvaluateConfig",
)
register_verb(
    "sweep",
    "ablations: train and evaluate a grid of settings, continue it, write a page",
    "semantica.benchmarks.quality.sweep.command:sweep",
    "semantica.benchmarks.quality.sweep.command:SweepConfig",
)
register_verb(
    "bench",
    "time the operators, compare two runs, inspect the compiled kernels",
    "semantica.benchmarks.bench:run",
)


def usage() -> str:
    lines = [
        f"semantica {__version__}: image variations with a fast conditioned diffusion model",
        "",
        "usage: semantica VERB [options]        semantica VERB --help for a verb's options",
        "",
        *(f"  {name:<17} {verb.help}" for name, verb in VERBS.items()),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 for a failed check, 2 for a mistake in what was asked for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # names of files need not be text, and no command ends for having named one; standard error does the same
        sys.stdout.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if arguments[0] == "--version":
        print(f"semantica {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in VERBS:
        return fail(f"unknown verb {name!r}: choose one of {', '.join(VERBS)}", 2)
    return answered(lambda: VERBS[name](name, rest))


def answered(work: Callable[[], int]) -> int:
    """The exit code of what is done, or of what went wrong in it, which is then said in one line."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except UserError as error:
        return fail(str(error), 2)
    except (ArtifactError, FloatingPointError) as error:
        return fail(str(error), 1)
    except RuntimeError as error:
        # a fault of the program keeps its traceback
        if (message := device_failure(error)) is None:
            raise
        return fail(message, 1)
    except PermissionError as error:
        # such as a bundle's weights, which safetensors writes for their owner alone
        return fail(f"{error.filename} may not be used by this user ({error.strerror}): see its owner and mode", 2)
    except BrokenPipeError:
        # who read the output has left, and whatever is still buffered must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return fail("interrupted", 130)


def fail(message: str, code: int) -> int:
    print(f"semantica: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
