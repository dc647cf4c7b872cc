"""The `semantica` command: each verb's module is imported only when that verb runs."""

import contextlib
import io
import os
import sys

from semantica import __version__
from semantica.errors import ArtifactError, UserError

BOX = "│╭╮╰╯─"
USAGE = f"""semantica {__version__}: image variations with a fast conditioned diffusion model

usage: semantica VERB [options]        semantica VERB --help for a verb's options

  doctor     what is installed, and which implementation each operator uses
  demo       draw a data set, train on it, make variations, write a report
  pairs      find the pictures that share a web page: crawls in, training data out
  train      train a model on pairs of pictures, or continue a run
  sample     make variations of pictures
  export     turn a run into a bundle of ONNX graphs, checked against the network
  build      build TensorRT or AOTInductor engines from a bundle
  evaluate   figures for a run, or for a folder of pictures made elsewhere
  bench      time the operators, compare two runs, inspect the compiled kernels
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, 1 for a failed check, 2 for a mistake in what was asked for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(f"semantica {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return fail(f"unknown verb {verb!r}: choose one of {', '.join(VERBS)}")
    try:
        code = VERBS[verb](rest) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return fail(str(error))
    except (ArtifactError, FloatingPointError) as error:
        print(f"semantica: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # who read the output has left, and whatever is still buffered must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("semantica: interrupted", file=sys.stderr)
        return 130


def fail(message: str) -> int:
    print(f"semantica: {' '.join(message.split())}", file=sys.stderr)
    return 2


def parse(function, verb: str, arguments: list[str]):
    """Call a function, or build a dataclass, with arguments from the command line.

    Raises:
        UserError: an unknown option or an impossible value, in one line instead of the parser's box.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(function, prog=f"semantica {verb}", args=arguments)
    except SystemExit as left:
        # 2 is the parser's; 0 is after help, others come from what was called
        if left.code != 2:
            raise
        words = "".join(" " if c in BOX else c for c in said.getvalue()).split()
        raise UserError(" ".join(words)) from left


def doctor(arguments: list[str]) -> int:
    from semantica.doctor import run

    return parse(run, "doctor", arguments)


def demo(arguments: list[str]) -> None:
    from semantica.benchmarks.quality.demo import DemoConfig
    from semantica.benchmarks.quality.demo import demo as run

    run(parse(DemoConfig, "demo", arguments))


def pairs(arguments: list[str]) -> None:
    from semantica.train.pages.config import PairsConfig

    config = parse(PairsConfig, "pairs", arguments).check()
    try:
        if config.tokens is not None:
            from semantica.train.data.encode import store_tokens as run
        else:
            from semantica.train.pages.command import run
    except ImportError as error:
        raise UserError(f"'semantica pairs' needs {error.name}: install semantica-diffusion[pairs]") from error

    run(config)


def train(arguments: list[str]) -> None:
    from semantica.train.command import run

    run(arguments)


def sample(arguments: list[str]) -> None:
    from semantica.pipelines.sample import SampleConfig

    config = parse(SampleConfig, "sample", arguments)

    from semantica.pipelines.sample import sample

    sample(config)


def export(arguments: list[str]) -> None:
    from semantica.export.config import ExportConfig

    config = parse(ExportConfig, "export", arguments)

    from semantica.export.write import export

    export(config)


def build(arguments: list[str]) -> None:
    from semantica.export.config import BuildConfig

    config = parse(BuildConfig, "build", arguments)

    from semantica.export.build import build

    build(config)


def evaluate(arguments: list[str]) -> None:
    from semantica.benchmarks.quality.evaluate import EvaluateConfig, evaluate

    evaluate(parse(EvaluateConfig, "evaluate", arguments))


def bench(arguments: list[str]) -> int:
    from semantica.benchmarks.bench import USAGE, VERBS

    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in VERBS:
        raise UserError(f"unknown benchmark {name!r}: choose one of {', '.join(VERBS)}")
    config, run = VERBS[name]
    return run(parse(config, f"bench {name}", rest))


VERBS = {
    "doctor": doctor,
    "demo": demo,
    "pairs": pairs,
    "train": train,
    "sample": sample,
    "export": export,
    "build": build,
    "evaluate": evaluate,
    "bench": bench,
}

if __name__ == "__main__":
    sys.exit(main())
