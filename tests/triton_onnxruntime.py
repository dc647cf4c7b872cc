"""The `onnxruntime` backend of Triton, for servers that come without it: the same library, called from Python.

Triton runs this file in place of the backend's shared library (a "Python-based backend"). A file `packages` beside it
says where onnxruntime is.
"""

import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

# behind the server's own, whose numpy its C++ half was built for
sys.path.append(Path(__file__).with_name("packages").read_text())


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        import onnxruntime

        self.config = json.loads(args["model_config"])
        place = Path(args["model_repository"], args["model_version"], self.config["default_model_filename"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(place), options, providers=["CPUExecutionProvider"])
        ports = (*self.session.get_inputs(), *self.session.get_outputs())
        known = {port["name"] for port in (*self.config["input"], *self.config["output"])}
        if known != {port.name for port in ports}:
            raise pb_utils.TritonModelException(f"{self.config['name']} has other inputs or outputs than its config")
        self.scalars = {port.name for port in ports if not port.shape}

    def execute(self, requests: list) -> list:
        names = [port["name"] for port in self.config["output"]]
        given = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        if self.config["max_batch_size"]:
            made = self.session.run(names, {name: np.concatenate([one[name] for one in given]) for name in given[0]})
            places = np.cumsum([len(one[self.config["input"][0]["name"]]) for one in given])[:-1]
            answers = list(zip(*(np.split(array, places) for array in made)))
        else:
            answers = [
                self.session.run(names, {n: a.reshape(()) if n in self.scalars else a for n, a in one.items()})
                for one in given
            ]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(n, np.ascontiguousarray(a)) for n, a in zip(names, answer)])
            for answer in answers
        ]
