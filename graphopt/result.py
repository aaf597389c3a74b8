"""What an optimization returns: a model to call, to compare and to export."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from torch import Tensor, nn

from graphopt import writing
from graphopt.capture.signature import Signature, in_dtypes
from graphopt.errors import GraphError, LoweringError, UsageError, outer_door, require_positive_integer
from graphopt.ir import cost
from graphopt.ir.graph import Feeds, Graph, digest, dtype_name, shapes_text
from graphopt.lowering.backend import Backend, Runner
from graphopt.lowering.roofline import least_seconds
from graphopt.measure.limits import Limits
from graphopt.measure.machine import version
from graphopt.pipeline.instruments import Agree, display, watched
from graphopt.pipeline.passes import Pass, Stage
from graphopt.pipeline.runner import Pipeline
from graphopt.report.diff import GraphDiff
from graphopt.report.records import BenchResult, Report, Roofline

if TYPE_CHECKING:
    from rich.console import RenderableType

    from graphopt.measure.timing import Ratio

_VERSIONS = ("graphopt", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Trained:
    """What training leaves: a graph of torch.fx, beside the one that it began as."""

    graph: Graph
    before: Graph
    state: Mapping[str, Tensor]
    """The tensors of the module that was handed in, by their names in its state_dict; empty where it was no module."""

    def state_dict(self) -> dict[str, Tensor]:
        """See `Optimized.state_dict`."""
        if not self.state:
            raise GraphError("state_dict is for a module, and none was handed in: export the model, or use .module")
        module = self.graph.module()
        now = module.state_dict() | self.graph.unpacked(module)
        read = {*self.before.unpacked(), *(name for name, _ in self.before.constants())}
        # By the memory of the tensor that it replaces: a tied weight has several names, and the graph keeps one.
        found: dict[int, Tensor] = {
            before.data_ptr(): now[name].detach().to(before.dtype)
            for name, before in self.state.items()
            if name in now and now[name].shape == before.shape
        }
        for name, before in self.state.items():
            fits = now[name].shape == before.shape if name in now else before.data_ptr() in found or name not in read
            if not fits:
                is_now = f"{list(now[name].shape)}" if name in now else "in another form"
                raise GraphError(
                    f"{name} of the module is {list(before.shape)}, and is {is_now} now, so the module cannot take "
                    "it back: export the model, or use .module"
                )
        return {name: found.get(before.data_ptr(), before).detach().clone() for name, before in self.state.items()}


@dataclass(repr=False)
class Optimized:
    """A model that was made smaller and faster. Call it as the original; `.report` says what was done to it.

    `optimize` takes it again, for more passes or for another target of the same dialect.
    """

    captured: Graph
    """As it came in, in ops: before any pass of this call."""
    transformed: Graph
    """After the passes that were asked for: quantize and dequantize stand around float ops.

    `module` is made of it, and it is what a further `optimize` starts from."""
    folded: Graph
    """After the target's own passes too, still in ops."""
    lowered: Graph
    """In the engine's operators: what the target runs."""
    report: Report
    backend: Backend
    signature: Signature
    feeds: list[Feeds]
    threads: int | None = None
    pipeline: Pipeline = field(default_factory=Pipeline)
    """The passes of this call, the target's own among them."""
    earlier: tuple[Pass, ...] = ()
    """The passes of earlier calls, where this one went on from what `optimize` had returned; first to last."""

    trained: Trained | None = None
    """What the passes that train have left, where nothing lossy follows them."""
    sparse: Mapping[str, str] = field(default_factory=dict)
    """By the label of a site, the pattern of zeros in its weight that later training must keep."""
    leads: bool = True
    """False on the ranks of a mesh but rank 0: there `export` writes nothing, and what the model is called with runs in
    the forms that need no measuring."""
    origin: Path | None = None
    """The folder of transformers that the model came from, whose tokenizer `bundle` takes along."""

    others: Mapping[str, Callable[[], Optimized]] = field(default_factory=dict)
    """Of a race: by the suffix of a file, what makes the fastest result that is written to such a file."""

    def __str__(self) -> str:
        """The headline and the table of passes; `.report` has the rest."""
        from graphopt.report import text

        return text.summary(self.report)

    def __repr__(self) -> str:
        from graphopt.report import tables

        return f"<Optimized {self.report.source} for {self.backend.name}: {tables.headline(self.report)}>"

    def __rich__(self) -> RenderableType:
        from graphopt.report import terminal

        return terminal.summary(self.report)

    def _repr_html_(self) -> str:
        from graphopt.report import html

        return html.summary(self.report)

    @property
    def own_passes(self) -> tuple[Pass, ...]:
        """The passes of this call that made `transformed`, first to last."""
        return tuple(pass_ for pass_ in self.pipeline.leaves() if pass_.stage is not Stage.LOWER)

    @property
    def applied(self) -> tuple[Pass, ...]:
        """The passes of all calls that made `transformed`, first to last."""
        return (*self.earlier, *self.own_passes)

    @cached_property
    def runner(self) -> Runner:
        """The lowered graph, compiled; above 2 GB of weights not before it is asked for."""
        lowered = self.lowered if self.leads else self.backend.lower(self.folded)[0]
        return self.backend.compile(lowered, self.threads)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy that is changed and run by itself; the weights, to which nothing writes, are shared."""
        graphs = {name: getattr(self, name).clone() for name in ("captured", "transformed", "folded", "lowered")}
        feeds: list[Feeds] = [{name: tensor.clone() for name, tensor in one.items()} for one in self.feeds]
        return replace(self, report=copy.deepcopy(self.report, memo), feeds=feeds, **graphs)

    def set_roofline(self, limits: Limits, seconds: Sequence[float]) -> None:
        """Report how much of what a run takes the machine's limits explain. seconds: p50 at each example input."""
        self.report.roofline = [
            Roofline(shapes_text(feeds), taken, least_seconds(self.folded, feeds, limits, self.backend.precision))
            for feeds, taken in zip(self.feeds, seconds, strict=True)
        ]

    def forget_state(self) -> None:
        """Reset a stateful model to its initial state."""
        if self.lowered.stateful:
            self.__dict__.pop("runner", None)

    def run_anew(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of a first call; feeds stay as they are."""
        self.forget_state()
        return self.runner({name: tensor.clone() for name, tensor in feeds.items()} if self.lowered.stateful else feeds)

    @cached_property
    def module(self) -> nn.Module:
        """The graph of ops as a torch.fx.GraphModule (targets of PyTorch only), which stays the same object.

        Read its `.code`, call it as the original, train it further (train() and eval() work; integers are float
        parameters that each call rounds), trace it again with torch.export. It is not the fast form: calling this
        result, and what `export` writes, run the target's kernels. It has tensors of its own: to deploy what was
        trained, hand it to `optimize` again, which finds the integers in it.
        """
        return self.transformed.module(self.signature.rebuild)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the module that was handed in, as they were trained: its `load_state_dict` takes them.

        Weights that are rounded are the floats behind the rounding. Raises GraphError where no module was handed in,
        nothing was trained, or a pass changed the shape of a tensor or put others in its place.
        """
        if self.trained is None:
            raise GraphError(
                "state_dict is of a model that was trained: the last lossy pass must be one that trains (finetune, "
                "distill)"
            )
        return self.trained.state_dict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the target: inputs and result as the original model has them; numpy in gives numpy out.

        Integers are widened to what the model takes, and floats rounded, with a warning. Raises CaptureError where an
        input is missing, unknown or no tensor, UsageError where the engine does not run on what is given, and
        LoweringError where it does not load the model (`runner`).
        """
        feeds, numpy = self.signature.bind(args, kwargs)
        feeds = in_dtypes(feeds, self.lowered.inputs)
        runner = self.runner
        with outer_door(UsageError, partial(self._does_not_run, feeds)):
            results: list[Any] = runner(feeds)
            if numpy:
                results = [np.asarray(result) if isinstance(result, Tensor) else result for result in results]
            return self.signature.rebuild(results)

    def _does_not_run(self, feeds: Feeds) -> str:
        """What was given, and what would be right."""
        takes = ", ".join(
            f"{value.name} [{', '.join(map(str, value.shape or ('?',)))}] {dtype_name(value.dtype)}"
            for value in self.lowered.inputs
        )
        given = ", ".join(f"{name} {list(one.shape)} {dtype_name(one.dtype)}" for name, one in feeds.items())
        return f"the model does not run on {given}; it takes {takes}"

    def diff(self) -> GraphDiff:
        """The graph before and after, to print (text), to show in a terminal (rich) or in a notebook (html)."""
        return GraphDiff.of(self.captured, self.folded)

    def bench(self, inputs: Any = None, *, rounds: int = 15, verbose: bool | None = None) -> BenchResult:
        """Time against the original graph on the same engine, paired and interleaved, at each example shape.

        inputs: a batch or a list of batches; the example inputs by default. rounds: of the two, one after the other,
        at least 1. verbose: as for `optimize`. Raises UsageError without inputs, where these are not the model's, and
        where the engine does not run here.
        """
        from graphopt.measure.machine import environment, header

        self.backend.require_runs()
        require_positive_integer("rounds", rounds)
        several = inputs if isinstance(inputs, list) else [] if inputs is None else [inputs]
        batches = [self.signature.bind((one,) if not isinstance(one, tuple) else one, {})[0] for one in several]
        if not (batches or self.feeds):
            raise UsageError("bench needs inputs: pass bench(inputs=<a batch>)")
        with outer_door(LoweringError, f"{self.backend.name} does not load the original"):
            original = self.backend.compile(self.captured, self.threads)
        machine = environment()
        result = BenchResult(header(machine, self.threads or int(machine["cores"])))
        for feeds in batches or self.feeds:
            with (
                outer_door(UsageError, partial(self._does_not_run, feeds)),
                watched(display(verbose), f"measure {shapes_text(feeds)}", rounds) as advance,
            ):
                result.rows.append((shapes_text(feeds), self._ratios(original, feeds, rounds, advance)))
        return result

    def _ratios(
        self, original: Runner, feeds: Feeds, rounds: int, on_round: Callable[[str], object]
    ) -> dict[str, Ratio]:
        """How many times faster than the original this is at one example shape; the control is the original again."""
        from graphopt.measure.timing import paired

        placed = self.backend.place(feeds)
        runners = {"original": original, "control": original, "optimized": self.runner}
        calls = {name: partial(runner, placed) for name, runner in runners.items()}
        ratios = paired(calls, baseline="original", rounds=rounds, clock=self.backend.clock, on_round=on_round)
        return {name: ratios[name] for name in ("optimized", "control")}

    def graphsurgeon(self) -> Any:
        """The deployable model as an onnx_graphsurgeon.Graph, for surgery by hand; `optimize` takes it back.

        Raises GraphError where the target deploys no ONNX.
        """
        with outer_door(GraphError, "the model cannot become an onnx_graphsurgeon.Graph"):
            return self.backend.graphsurgeon(self.lowered)

    def export(
        self,
        path: str | Path,
        *,
        opset: int | None = None,
        portable: bool = False,
        external_data: bool | None = None,
        aot: bool = False,
    ) -> Path:
        """Write the deployable file, and beside it NAME.json with the report's figures; returns the file's path.

        NAME.json also says how the file is loaded as it was run here ("load"): the engine, its settings (session
        options, inference precision, threads), and a line of Python. Of a race (target="fastest", or a list), the
        fastest result that is written to such a file is taken: "x.onnx" is the best in ONNX, whichever engine won.

        path: a new file, or a regular one to replace, which may be the file that was optimized; links are followed. Its
        suffix is .onnx, or .pt2 for targets of PyTorch; openvino also writes its own form, .xml with a .bin beside it.
        tensorflow writes a folder, in the layout of TensorFlow Serving (NAME/1), which is read again and compared with
        the graph on the example inputs; a folder that it wrote before is replaced.

        Targets of PyTorch write a torch.export archive (.pt2), which runs where graphopt is installed. aot: compile an
        AOTInductor package in its place, which `torch._inductor.aoti_load_package` runs without graphopt, with inputs
        by keyword; it needs a C++ compiler, and an example input.
        opset: version of the standard operators. portable: standard operators only, for any engine (slower on the
        target). external_data: keep weights in NAME.DIGEST.data, which is named by its content, so that at any moment
        the file and its weights are of one export; what an earlier export left there is removed. None decides by size.
        The same input, pipeline and versions give the same bytes, but of a SavedModel. Of the ranks of a mesh rank 0
        writes, and the others return at once.

        Raises UsageError for another suffix, and for options that don't go together or that the target does not have;
        GraphError where there is no folder, or one in a file's place, a FIFO, a device or a link that leads nowhere,
        where a node has no spelling at `opset` (naming it), and where the file cannot be written, such as on a full
        disk. Then nothing is written, and what was there stays.
        """
        if not self.leads:
            return Path(path)
        with outer_door(GraphError, f"{path} cannot be written"):
            return self._export(Path(path), opset, portable, external_data, aot)

    def bundle(self, folder: str | Path, **options: Any) -> Path:
        """Write a folder that can be deployed and checks itself; see `graphopt.bundle`, which has the options."""
        from graphopt.serving.making import bundle  # the one import that goes up: see the contract in pyproject.toml

        return bundle(self, folder, **options)

    def _export(self, path: Path, opset: int | None, portable: bool, external_data: bool | None, aot: bool) -> Path:
        other = self.others.get(path.suffix)
        if other is not None and path.suffix not in self.backend.suffixes:
            return other()._export(path, opset, portable, external_data, aot)
        if self.backend.folder_mark and not aot:
            return self._export_folder(path, opset, portable, external_data)
        path = writing.place_of(path)
        if not aot:  # for which `package` wants .pt2
            self.backend.require_suffix(path)
        if aot and (opset is not None or portable or external_data is not None):
            raise UsageError("aot=True compiles for PyTorch: opset, portable and external_data are for ONNX files")
        if aot and not self.feeds:
            raise UsageError("aot=True needs example_inputs, for the compiler")
        graph, metadata = self.folded if portable else self.lowered, self._metadata(portable)
        if opset is not None or portable:
            self._check_exported(graph, opset)
        with writing.together(path, writing.manifest_of(path)) as (part, manifest):
            self._write_facts(manifest, path.name, aot)
            if aot:
                self.transformed.package(part, self.feeds[0], metadata)
            else:
                self.backend.export(graph, part, opset=opset, external_data=external_data, metadata=metadata)
        return path

    def _export_folder(self, path: Path, opset: int | None, portable: bool, external_data: bool | None) -> Path:
        """Write what is a folder, read it again, and compare it with the graph on the example inputs."""
        self.backend.require_suffix(path)
        if opset is not None or portable or external_data is not None:
            raise UsageError(f"{self.backend.name} writes no ONNX: opset, portable and external_data are for .onnx")
        with (
            writing.whole(writing.manifest_of(path)) as manifest,
            writing.whole_folder(path, self.backend.folder_mark, lambda: self.backend.folder_files) as part,
        ):
            self._write_facts(manifest, path.name, False)
            self.backend.export(self.lowered, part, metadata=self._metadata(False))
            self._check_written(part)
        return path

    def _check_written(self, part: Path) -> None:
        """Raise GraphError where what was written computes something else. A model above 2 GB is not run."""
        if not self.feeds or cost.Cost.of(self.lowered).bytes > cost.LARGE:
            return
        run = self.backend.written(self.lowered, part)
        reference = Agree(self.lowered, self.feeds, self.signature.outputs)
        if run is not None and (moved := reference.moved_by(run, self.lowered)) is not None:
            raise GraphError(f"read again, what was written computes something else: {moved}")

    def _write_facts(self, manifest: Path, file: str, aot: bool) -> None:
        """Write what is known of an exported file beside it."""
        facts = self.report.to_dict() | {"load": self._loading(file, aot)}
        manifest.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")

    def _loading(self, file: str, aot: bool) -> Mapping[str, Any]:
        """How the file is loaded, as plain data."""
        if aot:
            return {"engine": f"torch {version('torch')}", "python": f"torch._inductor.aoti_load_package({file!r})"}
        return self.backend.loading(file, self.threads)

    def _check_exported(self, graph: Graph, opset: int | None) -> None:
        """Run what is to be written, which is not what ran before. Raises GraphError where it computes something else.

        A model above 2 GB is not run.
        """
        if not self.feeds or cost.Cost.of(graph).bytes > cost.LARGE:
            return
        what = "a portable file" if opset is None else f"the file at opset {opset}"
        with outer_door(GraphError, f"{what} does not run: give another opset, or leave it out"):
            reference = Agree(graph, self.feeds, self.signature.outputs)
            rounds = self.backend.rounds(graph)
            for level, run in self.backend.exported(graph, opset).items():
                if (moved := reference.moved_by(run, graph, rounds=rounds)) is not None:
                    raise GraphError(f"{what} would compute something else (optimizations: {level}): {moved}")

    def _metadata(self, portable: bool) -> dict[str, str]:
        """What stands in the file itself: all that decides its bytes, and no measured figure."""
        return {
            "graphopt.pipeline": self.report.pipeline,
            **({"graphopt.earlier": ",".join(map(str, self.earlier))} if self.earlier else {}),
            "graphopt.target": self.report.target + (" (portable)" if portable else ""),
            "graphopt.versions": json.dumps(self.report.versions, sort_keys=True),
            "graphopt.input": digest(self.captured),
            "graphopt.choices": json.dumps({choice["rule"]: choice["sites"] for choice in self.report.choices}),
        }


def versions() -> dict[str, str]:
    """The versions of what a result depends on, by package."""
    return {name: version(name) for name in _VERSIONS}
