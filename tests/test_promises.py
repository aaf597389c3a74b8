"""What an error advises works: each mistake gives its advice, and what is advised then runs."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
import typer
from torch import Tensor, nn

import graphopt
from graphopt import GraphoptError, Optimized, UsageError
from graphopt.cli.app import app
from graphopt.passes import REGISTRY, Sparsify
from graphopt.pipeline.text import parse
from graphopt.report.declines import SENTENCES as DECLINES
from tests.models import model as onnx_model

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4
PAIRS = [{"x": X, "labels": LABELS}]
BATCHES = [{"x": X}]


class Perceptron(nn.Module):
    """x [n, 16] -> [n, 4]."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 4)
        self.norm = nn.BatchNorm1d(64) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))  # type: ignore[no-any-return]


def module() -> nn.Module:
    return Perceptron().eval()


def proto() -> onnx.ModelProto:
    torch.manual_seed(0)
    text = "g (float[n,16] x) => (float[n,4] y) { h = MatMul(x, A)  r = Relu(h)  y = MatMul(r, B) }"
    return onnx_model(text, {"A": torch.randn(16, 64), "B": torch.randn(64, 4)})


def once(batches: list[Any]) -> Iterator[Any]:
    """Batches from a generator."""
    yield from batches


def squared(outputs: Any, batch: Any) -> Tensor:
    return (outputs**2).mean()  # type: ignore[no-any-return]


def quality(changed: Any) -> float:
    return -float((changed(X) ** 2).mean())


def optimize(passes: str | None = None, **options: Any) -> Optimized:
    """A module with an example, unless others are given."""
    given: dict[str, Any] = {"model": module(), "example_inputs": X, "measure": False} | options
    return graphopt.optimize(given.pop("model"), passes, **given)


of_proto = partial(optimize, model=proto(), example_inputs=None)


class Promise(NamedTuple):
    """A mistake, a part of what the error advises, and calls that follow the advice."""

    wrong: Callable[[], Any]
    advice: str
    right: tuple[Callable[[], Any], ...]



TRAIN = "finetune{steps=1}"
MOVE = "sparsify{amount=0.5 criterion=movement}"
PROMISES = {
    # what comes in
    "a module alone": Promise(
        lambda: optimize(example_inputs=None), "pass example_inputs= or calibration=", (lambda: optimize(),)
    ),
    "no example": Promise(
        lambda: optimize(example_inputs=[]), "give at least one batch", (lambda: optimize(example_inputs=[X, X[:4]]),)
    ),
    "a generator for a module": Promise(
        lambda: optimize("quantize", example_inputs=None, calibration=once(BATCHES)),
        "pass a list or a DataLoader", (lambda: optimize("quantize", example_inputs=None, calibration=BATCHES),)
    ),
    "an ONNX model on a target of PyTorch": Promise(
        lambda: of_proto(target="fbgemm"), "graphopt.to_torch makes one of a file",
        (lambda: of_proto(target="onnxruntime"), lambda: optimize(target="fbgemm"),
         lambda: optimize(model=graphopt.to_torch(proto(), example_inputs=X), target="fbgemm")),
    ),
    "axes of what is traced": Promise(
        lambda: of_proto(dynamic_shapes={"x": {0: "n"}}), "leave it out, or hand over the nn.Module",
        (lambda: of_proto(), lambda: optimize(dynamic_shapes={"x": {0: "n"}})),
    ),
    # data
    "static without data": Promise(
        lambda: optimize("quantize{scheme=static}"), "pass calibration=<batches of inputs>",
        (lambda: optimize("quantize{scheme=static}", calibration=BATCHES),
         lambda: optimize("quantize{scheme=dynamic}")),
    ),
    "a goal without data": Promise(
        lambda: optimize("quantize{sqnr=20}"), "pass calibration=<batches of inputs>",
        (lambda: optimize("quantize{sqnr=20}", calibration=BATCHES),),
    ),
    "a goal without a measure": Promise(
        lambda: optimize("quantize{max_drop=0.1}", calibration=BATCHES), "pass evaluate=<function of the model",
        (lambda: optimize("quantize{max_drop=0.1}", calibration=BATCHES, evaluate=quality),),
    ),
    "gradients without a loss": Promise(
        lambda: optimize("prune{neurons=0.5 criterion=taylor}", calibration=BATCHES, target="fbgemm"),
        "pass loss=<function of (outputs, batch)>, or batches with labels",
        (lambda: optimize("prune{neurons=0.5 criterion=taylor}", calibration=BATCHES, loss=squared, target="fbgemm"),
         lambda: optimize("prune{neurons=0.5 criterion=taylor}", calibration=PAIRS, target="fbgemm")),
    ),
    "a generator that is read twice": Promise(
        lambda: optimize("prune{neurons=0.5}", calibration=once(BATCHES)),
        "pass a list or a DataLoader, or use compensate=false or criterion=l2",
        (lambda: optimize("prune{neurons=0.5}", calibration=BATCHES),
         lambda: optimize("prune{neurons=0.5 compensate=false}", calibration=once(BATCHES)),
         lambda: optimize("prune{neurons=0.5 criterion=l2}", calibration=once(BATCHES))),
    ),
    "a dict by other names": Promise(
        lambda: optimize("quantize", calibration=[{"y": X}]), "calibration batch 0 has no 'x'; there are y",
        (lambda: optimize("quantize", calibration=BATCHES),),
    ),
    # training
    "training without data": Promise(
        lambda: optimize(TRAIN), "pass training=<batches of inputs, and labels where the loss needs them>",
        (lambda: optimize(TRAIN, training=PAIRS),),
    ),
    "training without a loss": Promise(
        lambda: optimize(TRAIN, training=BATCHES), "pass loss=<function of (outputs, batch)>, or batches with labels",
        (lambda: optimize(TRAIN, training=BATCHES, loss=squared), lambda: optimize(TRAIN, training=PAIRS)),
    ),
    "data without training": Promise(
        lambda: optimize("quantize", training=PAIRS), "add distill or finetune",
        (lambda: optimize(f"{TRAIN},quantize", training=PAIRS),
         lambda: optimize("distill{steps=1},quantize", training=BATCHES)),
    ),
    "a teacher of finetune": Promise(
        lambda: optimize(TRAIN, training=PAIRS, teacher=module()), "use distill, or leave it out",
        (lambda: optimize("distill{steps=1}", training=PAIRS, teacher=module()),
         lambda: optimize(TRAIN, training=PAIRS)),
    ),
    "a teacher that drops out": Promise(
        lambda: optimize("distill{steps=1}", training=PAIRS, teacher=module().train()), "call teacher.eval()",
        (lambda: optimize("distill{steps=1}", training=PAIRS, teacher=module().train().eval()),),
    ),
    "patience without evaluations": Promise(
        lambda: optimize("finetune{steps=1 patience=1}", training=PAIRS), "or leave patience out",
        (lambda: optimize("finetune{steps=1 patience=1}", training=PAIRS, evaluate=quality),
         lambda: optimize(TRAIN, training=PAIRS)),
    ),
    "all to the labels": Promise(
        lambda: optimize("distill{steps=1 alpha=1}", training=PAIRS), "use finetune",
        (lambda: optimize(TRAIN, training=PAIRS),),
    ),
    "zeros that nobody learns": Promise(
        lambda: optimize(MOVE), "put distill or finetune behind it, or use another criterion",
        (lambda: optimize(f"{MOVE},{TRAIN}", training=PAIRS),
         lambda: optimize(f"{MOVE},distill{{steps=1}}", training=BATCHES), lambda: optimize("sparsify{amount=0.5}")),
    ),
    "zeros that are learned too late": Promise(
        lambda: optimize(f"{MOVE},quantize,{TRAIN}", training=PAIRS), "put distill or finetune between them",
        (lambda: optimize(f"{MOVE},{TRAIN},quantize", training=PAIRS),),
    ),
    # pipelines and options
    "the wrong order": Promise(
        lambda: optimize("quantize,sparsify{amount=0.5}"), "the right order is sparsify,quantize",
        (lambda: optimize("sparsify{amount=0.5},quantize"),),
    ),
    "a repeat over stages": Promise(
        lambda: optimize("repeat{times=2}(sparsify{amount=0.5},quantize)"), "repeat each stage by itself",
        (lambda: optimize("repeat{times=2}(sparsify{amount=0.5}),quantize"),),
    ),
    "a preset with options": Promise(
        lambda: optimize("fast{scheme=dynamic}"), "write simplify,quantize, with yours",
        (lambda: optimize("simplify,quantize{scheme=dynamic}"),),
    ),
    "a class for a pass": Promise(
        lambda: optimize([Sparsify]), "give pass objects, or one text",  # type: ignore[arg-type]
        (lambda: optimize([Sparsify(amount=0.5)]), lambda: optimize("sparsify{amount=0.5}")),  # type: ignore[arg-type]
    ),
    "two ways to choose ranks": Promise(
        lambda: optimize("low-rank{rank=0.5 energy=0.9}"), "give one of them",
        (lambda: optimize("low-rank{rank=0.5}"), lambda: optimize("low-rank{energy=0.9}")),
    ),
    "an amount of a pattern": Promise(
        lambda: optimize("sparsify{pattern=2:4 amount=0.3}"), "leave amount out",
        (lambda: optimize("sparsify{pattern=2:4}"),),
    ),
    "a threshold in blocks": Promise(
        lambda: optimize("sparsify{amount=0.1 criterion=threshold pattern=4x1}"), "use criterion=magnitude",
        (lambda: optimize("sparsify{amount=0.1 criterion=magnitude pattern=4x1}"),),
    ),
    "sparsegpt in blocks": Promise(
        lambda: optimize("sparsify{amount=0.5 criterion=sparsegpt pattern=4x1}", calibration=BATCHES),
        "use unstructured, N:M or criterion=wanda",
        tuple(partial(optimize, f"sparsify{{{options}}}", calibration=BATCHES) for options in (
            "amount=0.5 criterion=sparsegpt", "pattern=2:4 criterion=sparsegpt",
            "amount=0.5 criterion=wanda pattern=4x1",
        )),
    ),
    "wanda over the model": Promise(
        lambda: optimize("sparsify{amount=0.5 criterion=wanda scope=global}", calibration=BATCHES),
        "use scope=local, or criterion=magnitude",
        (lambda: optimize("sparsify{amount=0.5 criterion=wanda scope=local}", calibration=BATCHES),
         lambda: optimize("sparsify{amount=0.5 criterion=magnitude scope=global}")),
    ),
    "kinds without a budget": Promise(
        lambda: optimize("prune{neurons=0.5 kinds=[neurons]}"), "give a share for each instead",
        (lambda: optimize("prune{neurons=0.5}"),),
    ),
    "movement over the model": Promise(
        lambda: optimize(f"prune{{neurons=0.5 criterion=movement scope=global}},{TRAIN}", training=PAIRS),
        "use scope=layer",
        (lambda: optimize(f"prune{{neurons=0.5 criterion=movement scope=layer}},{TRAIN}", training=PAIRS),),
    ),
    # targets
    "a measure of another machine": Promise(
        lambda: optimize(cpu="avx2", measure=True), "leave measure=True out",
        (lambda: optimize(cpu="avx2", measure=None),),
    ),
    "a cpu that is none": Promise(
        lambda: optimize(cpu="sse"), "there is no cpu 'sse'; give avx2, avx512, avx512_vnni",
        tuple(partial(optimize, cpu=cpu) for cpu in ("avx2", "avx512", "avx512_vnni")),
    ),
    "surgery on a graph of PyTorch": Promise(
        lambda: optimize(target="fbgemm").graphsurgeon(), "use target=onnxruntime",
        (lambda: optimize(target="onnxruntime").graphsurgeon(),),
    ),
    "a module of an ONNX graph": Promise(
        lambda: optimize().module, "use a target of PyTorch, such as fbgemm",
        (lambda: optimize(target="fbgemm").module(X),),
    ),
    "another dialect": Promise(
        lambda: graphopt.optimize(optimize(), target="fbgemm"), "optimize the original for fbgemm",
        (lambda: optimize(target="fbgemm"),),
    ),
    # results
    "the state of what was pruned": Promise(
        lambda: optimize(f"prune{{neurons=0.5}},{TRAIN}", training=PAIRS, target="fbgemm").state_dict(),
        "export the model, or use .module",
        (lambda: optimize(f"prune{{neurons=0.5}},{TRAIN}", training=PAIRS, target="fbgemm").module(X),),
    ),
    "the state of what was not trained": Promise(
        lambda: optimize("quantize").state_dict(), "must be one that trains (finetune, distill)",
        (lambda: optimize(f"quantize,{TRAIN}", training=PAIRS).state_dict(),
         lambda: optimize("quantize,distill{steps=1}", training=BATCHES).state_dict()),
    ),
    "no such rounds": Promise(
        lambda: optimize().bench(rounds=0), "give a whole number, at least 1", (lambda: optimize().bench(rounds=1),)
    ),
    "sites of modules": Promise(
        lambda: graphopt.compare(module(), optimize("quantize"), BATCHES, sites=True), "give what optimize returned",
        (lambda: graphopt.compare(optimize(), optimize("quantize"), BATCHES, sites=True),),
    ),
    "a budget for one site": Promise(
        lambda: graphopt.sensitivity(proto(), "low-rank{params=0.5}", calibration=BATCHES), "such as",
        (lambda: graphopt.sensitivity(proto(), "low-rank{rank=0.5}", calibration=BATCHES),),
    ),
    "learned zeros at one site": Promise(
        lambda: graphopt.sensitivity(proto(), MOVE, calibration=BATCHES), "use another criterion",
        (lambda: graphopt.sensitivity(proto(), "sparsify{amount=0.5}", calibration=BATCHES),),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if place % 2 else []) for place, name in enumerate(PROMISES)]
)
def test_what_an_error_advises_works(name: str) -> None:
    promise = PROMISES[name]
    with pytest.raises(GraphoptError) as caught:
        promise.wrong()
    assert promise.advice in str(caught.value)
    for call in promise.right:
        call()


EXPORTS: dict[str, tuple[str | None, dict[str, Any], str, dict[str, Any]]] = {
    # passes, what is wrong, the advice, what is right
    "an opset of another time": (None, {"opset": 3}, "cannot write opset 3; give 11 to ", {"opset": 11}),
    "an opset before what it must hold": (
        "quantize{scheme=weight-only bits=4}", {"opset": 17, "portable": True}, "give another opset, or leave it out",
        {"opset": 21, "portable": True},
    ),
    "aot of ONNX": (None, {"aot": True}, "a graph of the onnx dialect is not compiled", {}),
    "aot with an opset": (None, {"aot": True, "opset": 20}, "are for ONNX files", {"opset": 20}),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_what_an_error_of_export_advises_works(name: str, tmp_path: Path) -> None:
    passes, wrong, advice, right = EXPORTS[name]
    small = optimize(passes)
    with pytest.raises(GraphoptError) as caught:
        small.export(tmp_path / "out.onnx", **wrong)
    assert advice in str(caught.value)
    small.export(tmp_path / "out.onnx", **right)


# --- what all messages name ----------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent


def texts(tree: ast.AST) -> Iterator[str]:
    """All texts in a piece of code, with {} for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def messages() -> list[str]:
    """The texts in whatever is raised or returned, and the sentences of declines."""
    found = list(DECLINES.values())
    for folder in ("graphopt", "passes", "backends"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise | ast.Return):
                    found += texts(node)
    return found


def takes(cls: type[Any], option: str, value: str) -> bool:
    """Whether an option takes a value, whatever the others say."""
    try:
        parse(f"{cls.name}{{{option}={value}}}", REGISTRY)
    except UsageError as error:
        return f": {option} is " not in str(error)
    return True


def test_values_that_messages_name_are_taken() -> None:
    """`use criterion=l2`: some pass has such an option, and takes the value."""
    named = {pair for text in messages() for pair in re.findall(r"(?<![\w.{<])([a-z_]+)=([a-z0-9][\w:.-]*\w|\d)", text)}
    wrong = []
    for option, value in sorted(named):
        classes = [REGISTRY[name] for name in REGISTRY if option in vars(REGISTRY[name])["__dataclass_fields__"]]
        if classes and not any(takes(cls, option, value) for cls in classes):
            wrong.append(f"{option}={value}")
    assert len(named) > 15 and not wrong


OF_OTHERS = {
    "--trace", "--nproc-per-node", "--create-home", "--no-deps", "--start-period", "--no-cache-dir",
    "--model_config_file", "--rest_api_port", "--tensorflow_inter_op_parallelism", "--tensorflow_intra_op_parallelism",
}  # fmt: skip
"""Options of trtexec, torchrun, what a Dockerfile calls, and TensorFlow Serving."""


def test_options_and_extras_that_messages_name_are_there() -> None:
    """`--calibration` is an option of a command, and `graphopt[demo]` one of the package."""
    shown = "\n".join(messages())
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    params = [param for command in commands for param in command.params]
    options = {name for param in params for name in (*param.opts, *param.secondary_opts)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", shown)) - OF_OTHERS
    assert len(named) > 5 and named <= options
    extras = set(re.findall(r"graphopt\[(\w+)\]", shown))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert extras and extras <= set(project["project"]["optional-dependencies"])
