"""The teacher: a graph that is only run, with what it says of each batch kept on disk where wanted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from graphopt import writing
from graphopt.errors import GraphError, UsageError, described, first_line
from graphopt.ir.graph import Feeds, Graph, Value, digest, shapes_text, tensors_digest
from graphopt.training.meshes.mesh import Mesh
from graphopt.training.meshes.sharded import shard


class Teacher:
    """Outputs of a graph, and some values inside it, for the student's batches."""

    def __init__(
        self,
        graph: Graph,
        also: Sequence[Value] = (),
        *,
        inputs: Sequence[str],
        device: torch.device,
        folder: str | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """also: values inside the graph. inputs: the student's, in order; those of a teacher with other names are
        taken in order. folder: keeps what it says of each batch, by the digest of the batch's content.
        mesh: of fsdp, which shards it, unless a folder answers some ranks and not others.

        Raises UsageError where the teacher reads inputs that the student has not, and when it is called, where it does
        not run on a batch, or the folder cannot be used.
        """
        self.graph, self.also, self.device = graph, list(also), device
        names = [value.name for value in graph.inputs]
        if set(names) <= set(inputs):
            self._feeds = {name: name for name in names}
        elif len(names) == len(inputs):
            self._feeds = dict(zip(names, inputs, strict=True))
        else:
            raise UsageError(f"the teacher has the inputs {', '.join(names)}, and the student has {', '.join(inputs)}")
        self._module: nn.Module | None = None
        if graph.dialect == "fx":
            module = graph.module(tuple, also=self.also).to(device)
            self._module = module
            if mesh is not None and mesh.sizes.fsdp > 1 and folder is None and isinstance(module, fx.GraphModule):
                self._module = shard(module, mesh)
        self._folder = None if folder is None else Path(folder)

    @cached_property
    def key(self) -> str:
        """Of what it says: the graph, and the values of `also`."""
        return f"{digest(self.graph)} {[value.name for value in self.also]}"

    def __call__(self, feeds: Feeds) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs in order, and the values of `also`, without gradients."""
        given = {name: feeds[source] for name, source in self._feeds.items()}
        if self._folder is None:
            return self._run(given)
        file = self._folder / f"{self._digest(given)}.safetensors"
        if not file.is_file():
            outputs, also = self._run(given)
            self._keep(file, [*outputs, *also])
            return outputs, also
        try:
            known = load_file(file, device=str(self.device))
            values = [known[str(place)] for place in range(len(self.graph.outputs) + len(self.also))]
        except (OSError, SafetensorError, KeyError) as error:
            raise UsageError(f"cache: {file} is damaged ({first_line(error)}): delete it") from error
        return values[: len(self.graph.outputs)], values[len(self.graph.outputs) :]

    def _run(self, feeds: Feeds) -> tuple[list[Tensor], list[Tensor]]:
        try:
            with torch.no_grad():
                if self._module is not None:
                    result = self._module(*[feed.to(self.device) for feed in feeds.values()])
                    outputs, also = result if self.also else (result, [])
                    return list(outputs), list(also)
                values = self.graph.evaluate(feeds, [*self.graph.outputs, *self.also])
        except (RuntimeError, ValueError, IndexError, GraphError) as error:
            what = f"the teacher does not run on a training batch ({shapes_text(feeds)})"
            raise UsageError(f"{what}: {described(error)}") from error
        values = [value.to(self.device) for value in values]
        return values[: len(self.graph.outputs)], values[len(self.graph.outputs) :]

    def _digest(self, feeds: Feeds) -> str:
        kind = self.device.type  # products in bfloat16 are others than in float32
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return tensors_digest(feeds, f"{self.key} {kind} {dtype}")

    def _keep(self, file: Path, values: Sequence[Tensor]) -> None:
        stored = {str(place): value.cpu().contiguous().clone() for place, value in enumerate(values)}  # none is a view
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with writing.whole(file) as part:
                save_file(stored, part)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"cache: {file} cannot be written ({first_line(error)}): name another folder") from error
