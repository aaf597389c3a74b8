"""A module as torch.export traces it: tensors in by name, tensors out, whatever structures its own call has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature

from graphopt.errors import CaptureError
from graphopt.ir.structure import flattened

_INNER = "inner"


class Entry(nn.Module):
    """forward(one tensor for each input) -> the tensors that a module returns, in the order of its leaves."""

    def __init__(
        self, module: nn.Module, run: Callable[[Mapping[str, Tensor]], Any], inputs: Sequence[str]
    ) -> None:
        """run: calls the module with tensors by name. inputs: these names, as the arguments of forward follow."""
        super().__init__()
        self.add_module(_INNER, module)
        self.arguments = dict(zip(_identifiers(inputs), inputs, strict=True))
        """The names of the inputs, by argument of forward."""
        self.sizes = set[int]()
        """After a trace: which leaves of the result are integers that are computed from the sizes of the inputs."""

        def forward(**tensors: Tensor) -> tuple[Tensor, ...]:
            result = run({self.arguments[argument]: tensor for argument, tensor in tensors.items()})
            return tuple(self._tensors(result))

        # torch.export reads the arguments from the signature.
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in self.arguments]
        forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward

    def _tensors(self, result: Any) -> list[Tensor]:
        found = []
        for place, (path, leaf) in enumerate(flattened(result)[0]):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif isinstance(leaf, torch.SymInt):
                self.sizes.add(place)
                found.append(torch.scalar_tensor(leaf, dtype=torch.int64))  # type: ignore[arg-type]
            elif isinstance(leaf, torch.SymFloat | torch.SymBool):
                name = ".".join(map(str, path))
                raise CaptureError(f"the model returns {name or 'a number'}, which is computed from the sizes of its "
                                   "inputs and is no integer: return a tensor")  # fmt: skip
        return found

    def exported(self, example: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]) -> ExportedProgram:
        """The program of the module at an example, by input name; the axes are dynamic. Names in it are the module's.

        Raises what torch.export raises.
        """
        shapes = {argument: dict.fromkeys(axes.get(name, ()), torch.export.Dim.AUTO) or None
                  for argument, name in self.arguments.items()}  # fmt: skip
        given = {argument: example[name] for argument, name in self.arguments.items()}
        self.sizes.clear()
        return _inner(torch.export.export(self, (), given, dynamic_shapes=shapes, strict=False))


def _identifiers(names: Sequence[str]) -> list[str]:
    """A different identifier for each name."""
    found: list[str] = []
    for name in names:
        hint = re.sub(r"\W", "_", name)
        taken = {*found, "self", _INNER}
        found.append(next(one for one in (hint, *(f"{hint}_{n}" for n in range(len(names) + 3))) if one not in taken))
    return found


def _inner(program: ExportedProgram) -> ExportedProgram:
    """The program with tensors and nodes named as if the inner module had been exported."""

    def renamed(name: str) -> str:
        return name.removeprefix(f"{_INNER}.")

    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                if stack := node.meta.get("nn_module_stack"):
                    node.meta["nn_module_stack"] = {key: (_path(path), kind) for key, (path, kind) in stack.items()}
    signature = program.graph_signature
    for spec in (*signature.input_specs, *signature.output_specs):
        spec.target = None if spec.target is None else renamed(spec.target)
    return ExportedProgram(
        program.graph_module,
        program.graph,
        ExportGraphSignature(signature.input_specs, signature.output_specs),
        {renamed(name): tensor for name, tensor in program.state_dict.items()},
        program.range_constraints,
        program.module_call_graph[:1],
        constants={renamed(name): one for name, one in program.constants.items()},
        verifiers=program.verifiers,
    )


def _path(path: str) -> str:
    return "" if path == _INNER else path.removeprefix(f"{_INNER}.")
