"""An optimized model, or an .onnx file -> a bundle: a folder that can be deployed, and that checks itself."""

from __future__ import annotations

import glob
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt import writing
from graphopt.capture.folders import origin_of
from graphopt.capture.sources import capture
from graphopt.dialects.onnx.reading import external_files
from graphopt.errors import BundleError, GraphError, UsageError, outer_door, require_positive_integer
from graphopt.ir import cost
from graphopt.ir.graph import Feeds, Graph, digest
from graphopt.lowering.saturation import CPUS
from graphopt.measure import timing
from graphopt.measure.machine import environment
from graphopt.numerics.metrics import QUANTIZED_SQNR
from graphopt.pipeline.batches import Batches
from graphopt.report.records import Report
from graphopt.result import Optimized, versions
from graphopt.serving import batches, engine, folders, golden, manifest
from graphopt.serving.engine import Engine
from graphopt.serving.generation import can_generate
from graphopt.serving.golden import Arrays, Case
from graphopt.serving.manifest import (
    AnswerSpec,
    CpuSpec,
    EngineSpec,
    FileSpec,
    GoldenSpec,
    ImageSpec,
    Manifest,
    TensorSpec,
    TextSpec,
)
from graphopt.serving.texts import GIVES, Tokenizer

MODEL, PORTABLE = "model.onnx", "portable.onnx"
CASES = 16
"""Most golden cases that are made of the example inputs."""
_ITSELF = {True: QUANTIZED_SQNR + golden.DROP, False: golden.ENOUGH}
"""By whether a file is quantized: the SQNR (dB) that is recorded where its own answers are the golden ones. What
quantization lost is not known then, so that equal answers say nothing of what another CPU may differ by."""


def bundle(
    model: Optimized | str | Path,
    folder: str | Path,
    *,
    name: str | None = None,
    tokenizer: str | Path | None = None,
    code: str | None = None,
    inputs: Any = None,
    reference: str | Path | None = None,
    threads: int | None = None,
    measure: bool | None = None,
) -> Path:
    """Write a folder that can be deployed and checks itself wherever it is loaded; returns its path.

    model: what `optimize` returned, for a target that runs in ONNX Runtime on the CPU; or an .onnx file, which is taken
    as it is. folder: a new one, an empty one, or a bundle to replace that holds no files but its own.
    It holds model.onnx; portable.onnx, in standard operators, where the model has others; golden.npz, with inputs and
    the outputs of the float model; the tokenizer or the image transforms of the Hugging Face folder that the model came
    from; and manifest.json, with hashes, versions and what was measured.

    name: what servers call the model; the name of the folder by default. tokenizer: a folder with tokenizer.json, where
    the model came from no such folder. code: the name of an entry point of the group graphopt.serving, whose code makes
    inputs and answers. inputs: batches for the golden set; the example inputs by default, cut to several lengths.
    reference: the .onnx file that the model was made of, for golden outputs of an .onnx file; without it they are its
    own. threads: of the engine. measure: time the batch table; None does so unless GRAPHOPT_MEASURE=0.

    Raises UsageError for what cannot be bundled, and GraphError where the folder cannot be written; then nothing is.
    """
    folder = Path(folder)
    with outer_door(GraphError, f"{folder} cannot be written"):
        if threads is not None:
            require_positive_integer("threads", threads)
        name = _name(name, folder)
        source = _Source.of(model, reference, tokenizer, threads)
        measures = (timing.is_on() and source.cpu is None) if measure is None else measure
        with writing.whole_folder(folder, manifest.FILE, partial(_named_in, folder / manifest.FILE)) as part:
            source.write(part)
            _finished(part, source, name, code, inputs, measures)
    return folder


def _named_in(file: Path) -> list[str]:
    """The files that a manifest names, as patterns; of any schema, since a bundle of an older one is made again."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    names = found.get("files") if isinstance(found, dict) else None
    return [glob.escape(name) for name in names] if isinstance(names, dict) else []


@dataclass
class _Source:
    """What a bundle is made of."""

    model: Optimized | Path
    reference: Graph | None
    """The float model; None where the model is compared with itself."""
    feeds: list[Feeds]
    origin: Path | None
    tokenizer: Path | None
    """A folder that was named for its tokenizer."""
    threads: int | None
    report: Mapping[str, Any]
    facts: Mapping[str, str]
    """Where it comes from."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of the bundle, beside the notes of the report."""

    @classmethod
    def of(cls, model: Any, reference: str | Path | None, tokenizer: str | Path | None, threads: int | None) -> _Source:
        named = None if tokenizer is None else Path(tokenizer)
        if named is not None and not (named / folders.TOKENIZER).is_file():
            raise UsageError(f"{named} holds no {folders.TOKENIZER}: name the folder of the tokenizer")
        if isinstance(model, Optimized):
            if reference is not None:
                raise UsageError("reference= is for .onnx files: of what was optimized, the float model is known")
            if model.backend.name != engine.NAME:
                raise UsageError(
                    f"a bundle runs in {engine.NAME}, and this was optimized for {model.backend.name}: optimize for "
                    f"target={engine.NAME}, or use export"
                )
            facts = {"input": digest(model.captured), "source": model.report.source, "optimizer": "graphopt"}
            return cls(model, model.captured, list(model.feeds), named or model.origin, named,
                       threads or model.threads, model.report.to_dict(), facts)  # fmt: skip
        if not isinstance(model, str | Path):
            raise UsageError(f"a {type(model).__name__} cannot be bundled: give what optimize returned, or a file")
        path = Path(model)
        if not path.is_file() or path.suffix != ".onnx":
            raise UsageError(f"{path} is no .onnx file" if path.exists() else f"there is no file {path}")
        captured = capture(path, "onnx")
        float_graph = None if reference is None else capture(Path(reference), "onnx").graph
        return cls(path, float_graph, list(captured.feeds), named or origin_of(path.parent), named, threads,
                   _report_beside(path), {"input": digest(captured.graph), "source": path.name})  # fmt: skip

    @property
    def cpu(self) -> str | None:
        """The CPU that the model was lowered for, where it is another than this."""
        return self.model.backend.cpu if isinstance(self.model, Optimized) else None

    def write(self, part: Path) -> None:
        """Write the model, and its portable twin where it needs one."""
        if isinstance(self.model, Optimized):
            self.model.export(part / MODEL)
            (part / (MODEL + ".json")).unlink()
            if self._has_own_operators(part / MODEL) and cost.Cost.of(self.model.lowered).bytes <= cost.LARGE:
                self._write_twin(part)
            return
        for file in external_files(self.model):
            if file.parent.resolve() != self.model.parent.resolve():
                raise UsageError(f"{file} holds weights of {self.model}, and lies in another folder: put them together")
            _copy(file, part / file.name)
        _copy(self.model, part / MODEL)

    def _write_twin(self, part: Path) -> None:
        """Write the portable twin, or a note where standard operators compute something else."""
        assert isinstance(self.model, Optimized)  # as the caller has seen
        try:
            self.model.export(part / PORTABLE, portable=True)
        except GraphError as error:
            self.notes.append(f"the bundle has no portable twin: {error}")
            return
        (part / (PORTABLE + ".json")).unlink()

    @staticmethod
    def _has_own_operators(path: Path) -> bool:
        _, domains = engine.standards(path.read_bytes(), path.name)
        return bool(domains - {"ai.onnx", "ai.onnx.ml"})


def _finished(part: Path, source: _Source, name: str, code: str | None, inputs: Any, measures: bool) -> None:
    """Write everything but the model, and the manifest last."""
    model = (part / MODEL).read_bytes()
    weights = {file.name: file.read_bytes() for file in part.iterdir() if file.name not in (MODEL, PORTABLE)}
    running = Engine(model, weights, source.threads, where=name)
    if source.tokenizer is not None and GIVES[0] not in {one.name for one in running.inputs}:
        named = ", ".join(one.name for one in running.inputs)
        raise UsageError(f"the model takes {named}, and a tokenizer gives {', '.join(GIVES)}: leave tokenizer= out")
    opset, domains = engine.standards(model, name)
    limits = engine.index_limits(model)
    takes = tuple(replace(one, below=limits.get(one.name)) for one in running.inputs)
    text, image, answer, most = _steps(part, source, running)
    cases = _cases(source, running, inputs, most)
    score, each = _replayed(running, cases)
    if source.reference is None:
        most_sure = _ITSELF[engine.is_quantized(model)]
        score, each = min(score, most_sure), [min(one, most_sure) for one in each]
    (part / golden.FILE).write_bytes(golden.written(cases))
    axes = batches.Axes.of(running.inputs, running.outputs)
    axes = replace(axes, batched=axes.batched and batches.has_rows(running.run, cases[0]))
    example = {key: array[:1] for key, array in cases[0].inputs.items()} if axes.batched else cases[0].inputs
    neighbours = batches.measured_invariance(running.run, cases[0], running.inputs) if axes.batched else None
    outputs = batches.named_outputs(cases, running.inputs, running.outputs, axes)
    pad_id = 0 if text is None else text.pad_id
    padding = batches.measured_padding(running.run, cases, running.inputs, outputs, pad_id, most)
    if text is not None:
        _require_tokenizer_fits(part, text, takes)
    facts, compared = environment(), "itself" if source.reference is None else "float"
    found = Manifest(
        name=name,
        model=MODEL,
        weights=tuple(sorted(weights)),
        portable=PORTABLE if (part / PORTABLE).exists() else None,
        engine=EngineSpec(engine.NAME, engine.version(), engine.least_version(opset, domains)),
        opset=opset,
        cpu=CpuSpec("" if source.cpu else facts["cpu"], CPUS[source.cpu] if source.cpu else facts["flags"]),
        threads=source.threads,
        inputs=takes,
        outputs=outputs,
        batch_invariant=None if neighbours is None else neighbours >= batches.SAME,
        batch_sqnr=neighbours,
        padding=padding,
        batches=batches.measured_table(
            running.run, example, running.inputs, axes, most=most, clock=batches.CLOCK if measures else None
        ),
        golden=GoldenSpec(golden.FILE, len(cases), compared, score, tuple(each)),
        accuracy={"sqnr": score} | _metric(source.report),
        files={
            str(file.relative_to(part)): FileSpec(writing.sha256_of(file), file.stat().st_size)
            for file in sorted(part.rglob("*")) if file.is_file()
        },
        provenance={**source.facts, "graphopt": versions()["graphopt"]},
        text=text,
        image=image,
        code=code,
        answer=answer,
        max_length=most,
        report={**source.report, "notes": [*source.report.get("notes", []), *source.notes]},
    )  # fmt: skip
    (part / manifest.FILE).write_text(found.to_json(), encoding="utf-8")


# --- the golden set -------------------------------------------------------------------------------------------------


def _cases(source: _Source, running: Engine, inputs: Any, most: int | None) -> list[Case]:
    """Golden cases: the batches without their padding, whose outputs mean nothing, then rows of them alone."""
    given = source.feeds
    if inputs is not None:
        graph = source.reference if isinstance(source.model, Optimized) else None
        declared = (graph or capture(source.model, "onnx").graph).inputs
        given = list(Batches(inputs, declared, name="inputs", steps=CASES))
    if not given:
        raise UsageError("a bundle needs inputs for its golden set: optimize with example_inputs, or give inputs=")
    feeds = [{name: _array(tensor) for name, tensor in one.items()} for one in given][:CASES]
    axes = batches.Axes.of(running.inputs, running.outputs)
    rows = _rows(feeds, running, axes) if axes.batched else []
    feeds = [_without_padding(one, running, axes) for one in feeds]
    feeds += rows[: max(0, CASES - len(feeds))]
    found = []
    for one in feeds:
        if source.reference is None:
            outputs = running.run(one)
        else:
            tensors = {name: torch.from_numpy(array) for name, array in one.items()}
            results = source.reference.evaluate(tensors, source.reference.outputs)
            names = [value.name for value in running.outputs]
            outputs = {name: _array(result) for name, result in zip(names, results, strict=True)}
        found.append(Case(one, outputs))
    return found


def _rows(feeds: Sequence[Arrays], running: Engine, axes: batches.Axes) -> list[Arrays]:
    """Single rows of batches, without padding and cut to half of that."""
    found: list[Arrays] = []
    for one in feeds:
        count = len(next(iter(one.values())))
        for number in range(count):
            alone = engine.row(one, number)
            if axes.length is None:
                found += [alone] if count > 1 else []
            else:
                length = min(_lengths(alone, running, axes.length))
                found += [_cut(alone, running, axes.length, size) for size in (length, length // 2) if size]
    return found


def _without_padding(arrays: Arrays, running: Engine, axes: batches.Axes) -> Arrays:
    """A batch as long as its shortest row."""
    if axes.length is None:
        return arrays
    return _cut(arrays, running, axes.length, min(_lengths(arrays, running, axes.length)))


def _lengths(arrays: Arrays, running: Engine, axis: str) -> list[int]:
    """How long each row is without the padding at its end, by the mask of tokens where there is one."""
    length = batches.length_of(arrays, running.inputs, axis)
    mask = next((array for name, array in arrays.items() if "mask" in name and array.ndim == 2), None)
    if mask is None:
        return [length]
    return [int(row.sum()) if row.any() and row[: int(row.sum())].all() else length for row in mask != 0]


def _cut(arrays: Arrays, running: Engine, axis: str, length: int) -> Arrays:
    cut = dict(arrays)
    for spec in running.inputs:
        place = batches.axis_of(spec, axis)
        if place is not None:
            cut[spec.name] = arrays[spec.name].take(range(length), place)
    return cut


def _replayed(running: Engine, cases: Sequence[Case]) -> tuple[float, list[float]]:
    score, each = golden.replay(running.run, cases)
    if math.isnan(score) or score == -math.inf:
        raise BundleError("the model answers its example inputs with NaN, or not as the float model does at all")
    return score, each


def _array(tensor: Tensor) -> Any:
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).detach().cpu().numpy()


# --- what belongs to the model --------------------------------------------------------------------------------------


def _steps(
    part: Path, source: _Source, running: Engine
) -> tuple[TextSpec | None, ImageSpec | None, AnswerSpec | None, int | None]:
    """How texts or images become inputs, what is answered, and the most tokens: what the folder of the model says."""
    if source.origin is None:
        return None, None, None, None
    origin = folders.Folder.of(source.origin)
    text, image = None, None
    names = {one.name for one in running.inputs}
    if origin.has_tokenizer and names & set(GIVES[:1]):
        _copy(source.origin / folders.TOKENIZER, part / folders.TOKENIZER)
        generates = origin.is_causal and can_generate(running.inputs, running.outputs)
        text = origin.text_spec(generates)
    elif (transforms := origin.image_spec([one.name for one in running.inputs])) is not None:
        image = transforms
    return text, image, origin.answer_spec([one.name for one in running.outputs]), origin.max_length


def _require_tokenizer_fits(part: Path, text: TextSpec, inputs: Sequence[TensorSpec]) -> None:
    """Raise UsageError for another model's tokenizer, which has tokens that the embedding does not hold."""
    tokenizer = Tokenizer((part / text.tokenizer).read_bytes(), text, inputs, where=str(part.name))
    for spec in inputs:
        if spec.name == GIVES[0] and spec.below is not None and tokenizer.vocabulary > spec.below:
            raise UsageError(
                f"the tokenizer has {tokenizer.vocabulary} tokens, and the model holds {spec.below}: it is another "
                "model's"
            )


def _report_beside(path: Path) -> dict[str, Any]:
    """What `export` wrote beside a file, else a report that says no more than its name."""
    beside = path.with_name(path.name + ".json")
    empty = Report(source=path.name, target=engine.NAME, versions=versions()).to_dict()
    if not beside.is_file():
        return empty
    with outer_door(UsageError, f"{beside} is not what export wrote beside {path.name}: remove it"):
        found = json.loads(beside.read_text(encoding="utf-8"))
        return {key: found.get(key, value) for key, value in empty.items()}


def _metric(report: Mapping[str, Any]) -> dict[str, float]:
    """The user's own metric, where there was one."""
    shipped = report.get("shipped")
    return {f"metric_{key}": float(value) for key, value in shipped.items()} if isinstance(shipped, dict) else {}


def _name(name: str | None, folder: Path) -> str:
    if name is None:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).lstrip("._-") or "model"
    if not manifest.NAME.fullmatch(name):
        raise UsageError(f"name is {name!r}; letters, digits, dots and hyphens make one, at most 100")
    return name


def _copy(source: Path, place: Path) -> None:
    place.write_bytes(source.read_bytes())
