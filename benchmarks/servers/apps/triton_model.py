"""Triton's backend `onnxruntime`, in Python: the wheel with tritonserver has none. It runs a config.pbtxt for the one
in C++ unchanged."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(config["parameters"]["intra_op_thread_count"]["string_value"])
        options.inter_op_num_threads = int(config["parameters"]["inter_op_thread_count"]["string_value"])
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        folder = Path(args["model_repository"]) / args["model_version"]
        self.session = ort.InferenceSession(folder / config["default_model_filename"], options)
        self.inputs = [one["name"] for one in config["input"]]
        self.outputs = [one["name"] for one in config["output"]]

    def execute(self, requests):
        """One run for all: Triton's batcher puts requests of one shape together."""
        feeds = [
            {name: pb_utils.get_input_tensor_by_name(one, name).as_numpy() for name in self.inputs} for one in requests
        ]
        joined = {name: np.concatenate([one[name] for one in feeds]) for name in self.inputs}
        outputs, answers, start = self.session.run(self.outputs, joined), [], 0
        for one in feeds:
            end = start + len(one[self.inputs[0]])
            tensors = [
                pb_utils.Tensor(name, array[start:end]) for name, array in zip(self.outputs, outputs, strict=True)
            ]
            answers.append(pb_utils.InferenceResponse(output_tensors=tensors))
            start = end
        return answers
