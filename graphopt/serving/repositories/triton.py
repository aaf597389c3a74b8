"""A model repository of Triton: config.pbtxt, warm-up from the golden set, and an ensemble that takes texts.

A config is written as text of protobuf; tests parse it with tritonclient's ModelConfig.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from graphopt.serving.batches import Axes
from graphopt.serving.bundles import Bundle
from graphopt.serving.golden import Arrays
from graphopt.serving.manifest import Manifest, TensorSpec
from graphopt.serving.repositories.files import threads, write_model
from graphopt.serving.tensors_v2 import DATATYPES

DELAY = 0
"""Microseconds that a request waits for others: none, as batches form while the engine runs."""


def write(bundle: Bundle, folder: Path) -> None:
    """NAME/ for the model; with a tokenizer also NAME_tokenizer/ and NAME_text/, the ensemble of both."""
    own = bundle.manifest
    write_model(bundle, folder / own.name / "1", own.model)
    (folder / own.name / "config.pbtxt").write_text(model_config(bundle), encoding="utf-8")
    _write_warmup(bundle, folder / own.name / "warmup")
    if own.text is None or own.text.generates:
        return
    place = folder / f"{own.name}_tokenizer" / "1"
    place.mkdir(parents=True)
    (place / "tokenizer.json").write_bytes(bundle.content[own.text.tokenizer])
    (place / "model.py").write_text(_python_model(own), encoding="utf-8")
    (place.parent / "config.pbtxt").write_text(_tokenizer_config(own), encoding="utf-8")
    (folder / f"{own.name}_text" / "1").mkdir(parents=True)
    (folder / f"{own.name}_text" / "1" / ".keep").touch()
    (folder / f"{own.name}_text" / "config.pbtxt").write_text(_ensemble_config(own), encoding="utf-8")


def model_config(bundle: Bundle) -> str:
    """config.pbtxt of the model."""
    own = bundle.manifest
    most = _most_rows(own)
    inputs = _warm(bundle)
    lines = [
        f"name: {_text(own.name)}",
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        f"max_batch_size: {most}",
        *_tensors("input", own.inputs, most),
        *_tensors("output", own.outputs, most),
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        _parameter("intra_op_thread_count", str(threads(bundle))),
        _parameter("inter_op_thread_count", "1"),
        "model_warmup [ {",
        '  name: "golden"',
        f"  batch_size: {1 if most else 0}",
    ]
    for spec in own.inputs:
        dims = _dims(inputs[spec.name].shape[1 if most else 0 :])
        lines.append(
            f"  inputs {{ key: {_text(spec.name)} value {{ data_type: TYPE_{DATATYPES[spec.dtype]} dims: {dims} "
            f"input_data_file: {_text(_file(own, spec))} }} }}"
        )
    lines.append("} ]")
    if most:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {DELAY} }}")
    return "\n".join(lines) + "\n"


def _most_rows(own: Manifest) -> int:
    """Most rows of a batch; 0 where rows may change each other's answers, so that Triton does not batch."""
    return max((row.batch for row in own.batches), default=1) if own.batch_invariant else 0


def _warm(bundle: Bundle) -> Arrays:
    """One golden case, of one row where batches are made."""
    case = bundle.cases[0].inputs
    axes = Axes.of(bundle.manifest.inputs, bundle.manifest.outputs)
    return {name: array[:1] if axes.batched else array for name, array in case.items()}


def _write_warmup(bundle: Bundle, folder: Path) -> None:
    folder.mkdir()
    arrays = _warm(bundle)
    for spec in bundle.manifest.inputs:
        (folder / _file(bundle.manifest, spec)).write_bytes(arrays[spec.name].tobytes())


def _file(own: Manifest, spec: TensorSpec) -> str:
    return f"input_{own.inputs.index(spec)}"


def _tensors(key: str, specs: Sequence[TensorSpec], most: int) -> list[str]:
    """Without the batch axis where Triton adds it."""
    return [
        f"{key} [ {{ name: {_text(one.name)} data_type: TYPE_{DATATYPES[one.dtype]} "
        f"dims: {_dims(one.shape[1 if most else 0 :])} }} ]"
        for one in specs
    ]


def _dims(shape: Iterable[object]) -> str:
    return "[ " + ", ".join(str(size) if isinstance(size, int) else "-1" for size in shape) + " ]"


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}"


def _text(value: str) -> str:
    """A string of protobuf's text form, whose escapes are those of JSON."""
    return json.dumps(value)


# --- texts ------------------------------------------------------------------------------------------------------------


def _token_specs(own: Manifest) -> list[TensorSpec]:
    return [one for one in own.inputs if one.name in ("input_ids", "attention_mask", "token_type_ids")]


def _tokenizer_config(own: Manifest) -> str:
    outputs = [
        f"output [ {{ name: {_text(one.name)} data_type: TYPE_{DATATYPES[one.dtype]} dims: [ -1, -1 ] }} ]"
        for one in _token_specs(own)
    ]
    return "\n".join([
        f"name: {_text(f'{own.name}_tokenizer')}", 'backend: "python"', "max_batch_size: 0",
        'input [ { name: "TEXT" data_type: TYPE_STRING dims: [ -1 ] } ]', *outputs,
        "instance_group [ { count: 1 kind: KIND_CPU } ]", "",
    ])  # fmt: skip


def _ensemble_config(own: Manifest) -> str:
    maps = [f"input_map {{ key: {_text(one.name)} value: {_text(one.name)} }}" for one in _token_specs(own)]
    given = [f"output_map {{ key: {_text(one.name)} value: {_text(one.name)} }}" for one in _token_specs(own)]
    outputs = [f"output_map {{ key: {_text(one.name)} value: {_text(one.name)} }}" for one in own.outputs]
    return "\n".join([
        f"name: {_text(f'{own.name}_text')}", 'platform: "ensemble"', "max_batch_size: 0",
        'input [ { name: "TEXT" data_type: TYPE_STRING dims: [ -1 ] } ]', *_tensors("output", own.outputs, 0),
        "ensemble_scheduling {",
        f"  step [ {{ model_name: {_text(f'{own.name}_tokenizer')} model_version: -1",
        '    input_map { key: "TEXT" value: "TEXT" } ' + " ".join(given) + " } ]",
        f"  step [ {{ model_name: {_text(own.name)} model_version: -1",
        "    " + " ".join([*maps, *outputs]) + " } ]",
        "}", "",
    ])  # fmt: skip


def _python_model(own: Manifest) -> str:
    """For Triton's Python backend: it needs numpy and tokenizers, and nothing of graphopt."""
    assert own.text is not None  # as the caller has seen
    names = {one.name: one.dtype for one in _token_specs(own)}
    return f'''"""Texts -> the inputs of {own.name}, padded to the longest. Written by graphopt."""

import os

import numpy as np
import tokenizers
import triton_python_backend_utils as pb_utils

DTYPES = {names!r}
MAX_LENGTH = {own.text.max_length!r}
PAD_ID = {own.text.pad_id!r}


class TritonPythonModel:
    def initialize(self, args):
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.tokenizer = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        self.tokenizer.enable_padding(pad_id=PAD_ID)
        if MAX_LENGTH:
            self.tokenizer.enable_truncation(MAX_LENGTH)
        else:
            self.tokenizer.no_truncation()

    def execute(self, requests):
        responses = []
        for request in requests:
            texts = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()
            found = self.tokenizer.encode_batch([text.decode("utf-8") for text in texts.ravel()])
            columns = {{
                "input_ids": [one.ids for one in found],
                "attention_mask": [one.attention_mask for one in found],
                "token_type_ids": [one.type_ids for one in found],
            }}
            tensors = [pb_utils.Tensor(name, np.array(columns[name], dtype)) for name, dtype in DTYPES.items()]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses
'''
