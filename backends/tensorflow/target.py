"""TensorFlow: a SavedModel with a named signature, for TensorFlow Serving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from graphopt.backends.tensorflow import saved_model, translation
from graphopt.dialects.onnx.tensors import to_numpy
from graphopt.errors import LoweringError, UsageError, outer_door
from graphopt.ir.graph import Feeds, Graph
from graphopt.ir.rewrite import Choice, Rule
from graphopt.lowering.backend import Backend, Runner

_FILES = (".onnx", ".pt2", ".xml", ".pb", ".tflite", ".h5", ".keras")

_NO_KERNELS = ("Const", "Placeholder", "Identity", "NoOp", "ReadVariableOp")


class TensorFlow(Backend):
    """Computes in floats: TensorFlow has no kernels for the integers that `quantize` makes."""

    name: ClassVar[str] = "tensorflow"
    dialect: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "TensorFlow, in floats (needs the extra tf); exports a SavedModel for TensorFlow Serving"
    schemes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    round_to: ClassVar[Mapping[str, int]] = {"neurons": 16, "channels": 16, "width": 16, "rank": 16}
    folder_mark: ClassVar[str] = saved_model.FACTS
    folder_files: ClassVar[tuple[str, ...]] = saved_model.FILES

    def pipeline(self) -> str:
        return "dequantize"

    def accept(self, model: Any, example_inputs: Any) -> None:
        """Raises UsageError where the package is missing: before the passes run, not after."""
        saved_model.package()

    def notes(self) -> list[str]:
        return ["TensorFlow computes in floats: what prune and low-rank save is saved here, and integers become floats"]

    def rules(self, graph: Graph) -> Sequence[Sequence[Rule | Choice]]:
        """No rules: nodes are translated one by one. Raises LoweringError where some have no form."""
        translation.require_forms(graph)
        return ()

    def engine(self) -> str:
        return f"tensorflow {saved_model.package().__version__}"

    def loading(self, file: str, threads: int | None = None) -> Mapping[str, Any]:
        where = f"{file}/{saved_model.VERSION}"
        python = f"tensorflow.saved_model.load({where!r}).signatures[{saved_model.SIGNATURE!r}]"
        return {"engine": self.engine(), "threads": threads, "python": python}

    def compile(self, graph: Graph, threads: int | None = None) -> TensorFlowRunner:
        return TensorFlowRunner(graph, threads)

    def check(self, folded: Graph, runner: Runner) -> None:
        """Nothing: no int8 kernels are promised."""

    def require_suffix(self, path: Path) -> None:
        """Raise UsageError for the name of a file."""
        if path.suffix in _FILES:
            raise UsageError(f"tensorflow writes a folder, and {path.name} is named like a file: name it {path.stem}")

    def export(
        self,
        graph: Graph,
        path: Path,
        *,
        metadata: Mapping[str, str],
        opset: int | None = None,
        external_data: bool | None = None,
    ) -> None:
        if opset is not None or external_data is not None:
            raise UsageError("tensorflow writes a SavedModel: opset and external_data are for .onnx files")
        with outer_door(LoweringError, "tensorflow cannot save the model"):
            found = translation.function(saved_model.package(), graph)
            saved_model.write(found, path, [value.name for value in graph.inputs], metadata)

    def written(self, graph: Graph, path: Path) -> Callable[[Feeds], Sequence[Any]]:
        return saved_model.SavedModel(path, [value.name for value in graph.outputs])


class TensorFlowRunner(Runner):
    """The function that a SavedModel holds."""

    def __init__(self, graph: Graph, threads: int | None) -> None:
        self._tf = saved_model.package()
        if threads is not None:
            _set_threads(self._tf, threads)
        self._inputs = [value.name for value in graph.inputs]
        self._outputs = [value.name for value in graph.outputs]
        with outer_door(LoweringError, "tensorflow cannot build the model"):
            self.function = translation.function(self._tf, graph)

    def __call__(self, feeds: Mapping[str, Tensor]) -> list[Tensor]:
        given = [self._tf.constant(to_numpy(feeds[name])) for name in self._inputs]
        found = self.function.concrete(*given)
        return [saved_model.as_torch(found[name].numpy()) for name in self._outputs]

    def kernels(self) -> dict[str, int]:
        """The operations of the function, by kind."""
        kinds = (one.type for one in self.function.concrete.graph.get_operations())
        return dict(Counter(sorted(kind for kind in kinds if kind not in _NO_KERNELS)))


def _set_threads(tf: Any, threads: int) -> None:
    """Raises UsageError where TensorFlow has begun with others, which it keeps as long as the process lives."""
    threading = tf.config.threading
    if threading.get_intra_op_parallelism_threads() == threads:
        return
    try:
        threading.set_intra_op_parallelism_threads(threads)
        threading.set_inter_op_parallelism_threads(1)
    except RuntimeError as error:
        begun = threading.get_intra_op_parallelism_threads()
        raise UsageError(
            f"tensorflow has begun with {begun or 'all'} threads in this process, and keeps them: leave threads= out, "
            "or optimize in a process of its own"
        ) from error
