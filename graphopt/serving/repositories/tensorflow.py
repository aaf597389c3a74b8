"""A folder of models for TensorFlow Serving: a SavedModel in floats, and the file that names it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from graphopt.api import optimize
from graphopt.errors import BundleError
from graphopt.pipeline.instruments.agree import QUANTIZED_FLOOR
from graphopt.result import Optimized
from graphopt.serving import golden
from graphopt.serving.bundles import Bundle
from graphopt.serving.golden import Arrays
from graphopt.serving.repositories.files import threads, write_model

ROOT = "/models"
"""Where the folder is mounted in the server's container."""


def write(bundle: Bundle, folder: Path) -> None:
    """NAME/1/ for the SavedModel, NAME.json with its report, and models.config.

    Raises UsageError without the package tensorflow, LoweringError where it has no form of an operator, and BundleError
    where the SavedModel does not answer the golden inputs.
    """
    own = bundle.manifest
    cases = [{name: torch.from_numpy(array) for name, array in case.inputs.items()} for case in bundle.cases]
    with tempfile.TemporaryDirectory() as around:
        source = Path(around) / "model"
        write_model(bundle, source, own.portable or own.model)
        small = optimize(source / "model.onnx", target="tensorflow", example_inputs=cases, measure=False, verbose=False)
        small.export(folder / own.name)
    _require_golden(bundle, small, folder / own.name)
    (folder / "models.config").write_text(config(own.name, threads(bundle)), encoding="utf-8")


def config(name: str, count: int) -> str:
    """What the server reads with --model_config_file; in its first lines, how it is started."""
    return f"""# tensorflow_model_server --model_config_file={ROOT}/models.config --rest_api_port=8501
#   --tensorflow_intra_op_parallelism={count} --tensorflow_inter_op_parallelism=1
model_config_list {{
  config {{
    name: "{name}"
    base_path: "{ROOT}/{name}"
    model_platform: "tensorflow"
  }}
}}
"""


def _require_golden(bundle: Bundle, small: Optimized, written: Path) -> None:
    """Raise BundleError where what was written answers otherwise than it should.

    Where the golden outputs are those of the bundle's own integers, floats are held to no more than what rounding
    leaves.
    """
    saved = small.backend.written(small.lowered, written)
    assert saved is not None  # it runs here
    names = [one.name for one in bundle.manifest.outputs]

    def run(inputs: Arrays) -> Arrays:
        found = saved({name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: np.asarray(array) for name, array in zip(names, found, strict=True)}

    own = bundle.manifest.golden
    rounds = any(one.name == "dequantize" and one.changes for one in small.report.passes)
    least = QUANTIZED_FLOOR if rounds and own.reference == "itself" else golden.least(own.sqnr)
    score, _ = golden.replay(run, bundle.cases)
    if not score >= least:
        raise BundleError(
            f"{bundle.folder}: in TensorFlow, answers to the golden inputs have {score:.1f} dB, and need {least:.1f}"
        )
