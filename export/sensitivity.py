"""Which layers int8 costs least, for what they compute: each is quantised alone, and v compared.

As in mixed precision by sensitivity (Dong et al., HAWQ, arXiv 1905.03696; here by measurement, not by curvature).
Errors of layers are nearly independent, so that their squares add up.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from tqdm import tqdm

from semantica.export.calibration import Calibration, batches
from semantica.export.qdq import Layer, insert

# calibration samples that layers are judged on
JUDGED = 16


@dataclass(frozen=True)
class Cost:
    """What a layer in int8 costs: its scale, the calibration that gave it, and the error of v it makes alone.

    error: mean squared error of v over mean square of v.
    """

    layer: Layer
    scale: float
    method: str
    error: float


class Judge:
    """Runs variants of a folded graph on calibration samples."""

    def __init__(self, graph: Path, calibration: Calibration):
        self.graph, self.calibration = graph, calibration
        self.chosen = calibration.spread(JUDGED)
        self.expected = self.run(graph)

    def run(self, path: Path) -> np.ndarray:
        """v of the chosen samples."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(["v"], feeds)[0] for feeds in batches(self.calibration, self.chosen)])

    def error(self, scales: Mapping[str, float]) -> float:
        """Of v where these layers are in int8, as `Cost.error`."""
        model = ir.load(self.graph)
        insert(model, scales)
        # beside the graph, so that its weights are found
        probe = self.graph.with_name("probe.onnx")
        ir.save(model, probe)
        difference = self.run(probe).astype(np.float64) - self.expected
        return float(np.square(difference).mean() / np.square(self.expected.astype(np.float64)).mean())


def costs(judge: Judge, layers: Iterable[Layer], scales: Mapping[str, Mapping[str, float]]) -> list[Cost]:
    """Every layer that was calibrated, with the better of its scales; layers that read one tensor have one scale.

    scales: `{method: {node: scale}}`.
    """
    calibrated = [layer for layer in layers if all(layer.node in found for found in scales.values())]
    errors: dict[str, dict[str, dict[str, float]]] = {}
    # a line of progress where somebody watches
    for layer in tqdm(calibrated, "layers", leave=False, disable=None):
        for method, found in scales.items():
            error = judge.error({layer.node: found[layer.node]})
            errors.setdefault(layer.reads, {}).setdefault(method, {})[layer.node] = error
    made = []
    for layer in calibrated:
        trials = errors[layer.reads]
        method = min(trials, key=lambda name: sum(trials[name].values()))
        made.append(Cost(layer, scales[method][layer.node], method, trials[method][layer.node]))
    return made


def chosen(found: Iterable[Cost], target: float) -> list[Cost]:
    """The layers to quantise: cheapest first, by error for each product, while v stays `target` dB above the sum."""
    left, kept = 10 ** (-target / 10), []
    for cost in sorted(found, key=lambda cost: cost.error / cost.layer.products):
        if cost.error <= left:
            kept.append(cost)
            left -= cost.error
    return kept


def decibels(error: float) -> float:
    """Signal over error, of a relative squared error."""
    return round(-10 * float(np.log10(max(error, 1e-20))), 2)
