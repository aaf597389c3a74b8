"""SavedModels: written in the layout of TensorFlow Serving, and read again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.backends.tensorflow.translation import Function
from graphopt.dialects.onnx.tensors import TORCH_DTYPES, array_to_torch, to_numpy
from graphopt.dialects.silence import quiet
from graphopt.errors import UsageError
from graphopt.ir.graph import Feeds

SIGNATURE = "serving_default"
"""The signature that TensorFlow Serving takes where a request names none."""

VERSION = "1"
"""The folder of the model in that of its name: a server takes the highest number."""

FACTS = f"{VERSION}/assets.extra/graphopt.json"
"""How the model was made; loaders leave alone what lies there."""

FILES = tuple(f"{VERSION}/{name}" for name in ("saved_model.pb", "fingerprint.pb", "variables/variables.*"))
"""What a SavedModel holds besides. Files of the user may lie beside them: assets, requests to warm it up."""


def package() -> Any:
    """tensorflow. Raises UsageError where it is missing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # not what it says of the CPU at each start
    try:
        import tensorflow
    except ImportError as error:
        raise UsageError("target tensorflow needs the package tensorflow: pip install 'graphopt[tf]'") from error
    return tensorflow


def write(function: Function, folder: Path, inputs: Sequence[str], metadata: Mapping[str, str]) -> None:
    """VERSION/ in an empty folder. inputs: their names, in order."""
    tf = package()
    with quiet("tensorflow", "absl"):
        tf.saved_model.save(function.module, str(folder / VERSION), signatures={SIGNATURE: function.concrete})
    _name_inputs(folder / VERSION, inputs)
    facts = folder / FACTS
    facts.parent.mkdir()
    facts.write_text(json.dumps(dict(metadata), indent=2) + "\n", encoding="utf-8")


def _name_inputs(folder: Path, names: Sequence[str]) -> None:
    """Give the signature the names of the inputs, which tensorflow writes as names that Python allows: inputs_0."""
    from tensorflow.core.protobuf import saved_model_pb2

    whole = saved_model_pb2.SavedModel()
    whole.ParseFromString((folder / "saved_model.pb").read_bytes())
    (graph,) = whole.meta_graphs
    signature = graph.signature_def[SIGNATURE]
    renamed = {f"inputs_{place}": name for place, name in enumerate(names)}
    found = {renamed[key]: info.SerializeToString() for key, info in signature.inputs.items()}
    signature.ClearField("inputs")
    for name, info in found.items():
        signature.inputs[name].ParseFromString(info)
    for node in graph.object_graph_def.nodes:
        if node.HasField("bare_concrete_function"):
            keywords = node.bare_concrete_function.argument_keywords
            keywords[:] = [renamed.get(keyword, keyword) for keyword in keywords]
    (folder / "saved_model.pb").write_bytes(whole.SerializeToString(deterministic=True))
    (folder / "fingerprint.pb").unlink(missing_ok=True)  # of what it was before


class SavedModel:
    """A model that was written, read again as a server reads it: by its signature alone.

    Takes the inputs by name, and returns the outputs in order.
    """

    def __init__(self, folder: Path, outputs: Sequence[str]) -> None:
        tf = package()
        with tf.Graph().as_default(), quiet("tensorflow"):  # which says that this way of loading is old
            self._session = tf.compat.v1.Session()
            loaded = tf.compat.v1.saved_model.load(self._session, [tf.saved_model.SERVING], str(folder / VERSION))
        signature = loaded.signature_def[SIGNATURE]
        self._inputs = {name: info.name for name, info in signature.inputs.items()}
        self._outputs = [signature.outputs[name].name for name in outputs]

    def __call__(self, feeds: Feeds) -> list[Tensor]:
        given = {self._inputs[name]: to_numpy(tensor) for name, tensor in feeds.items()}
        return [as_torch(array) for array in self._session.run(self._outputs, given)]


_DTYPES: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values()}


def as_torch(found: Any) -> Tensor:
    """An array that TensorFlow returned, as a tensor."""
    array = np.asarray(found)
    return array_to_torch(array, _DTYPES[array.dtype.name])
