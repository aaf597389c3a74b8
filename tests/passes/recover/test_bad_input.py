"""What cannot be trained: each ends in one UsageError that names the value and the way out."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphopt
from graphopt import CaptureError, GraphoptError, Optimized, UsageError
from graphopt.pipeline.instruments import Instrument
from tests.training.networks import batches, dropping, generator, samples

X = samples(4)[0]
LABELLED, UNLABELLED = batches(), [x for x, _ in batches()]


def module(*sizes: int) -> nn.Module:
    """Linears of these widths with relus between them."""
    with torch.random.fork_rng():
        torch.manual_seed(len(sizes))
        layers: list[nn.Module] = []
        for ours, theirs in itertools.pairwise(sizes):
            layers += [nn.Linear(ours, theirs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


@pytest.fixture(scope="module")
def model() -> Optimized:
    """Captured once: a linear, a relu, a linear."""
    return graphopt.optimize(module(6, 8, 4), [], example_inputs=X, target="torch-cpu", agree=False)


def optimize(model: Any, passes: str, **options: Any) -> Optimized:
    if isinstance(model, nn.Module):
        options["example_inputs"] = X
    return graphopt.optimize(model, passes, target="torch-cpu", agree=False, **options)


def zero_division(*args: Any) -> Any:
    raise ZeroDivisionError("division by zero")


def no_memory(*args: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


FINETUNE, DISTILL = "finetune{epochs=1}", "distill{epochs=1}"
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    # data
    "no data": ("distill", {}, r"distill needs training data: pass training=.*\(on the command line: --training\)"),
    "no iterable": (FINETUNE, {"training": 3}, "training must be an iterable of batches, not a int"),
    "an empty list": (FINETUNE, {"training": []}, "the training data holds no batch"),
    "an empty loader": (
        FINETUNE, {"training": DataLoader(TensorDataset(X[:0]), 4)}, "the training data holds no batch",
    ),
    "a generator": (
        "finetune{epochs=2}", {"training": generator()}, "a generator can be read once.*pass a list or a DataLoader",
    ),
    "a wrong shape": (
        FINETUNE, {"training": [(torch.zeros(4, 5), torch.zeros(4))]},
        r"training batch 0, input 'input' has shape \[4, 5\], and the model takes \[batch, 6\]",
    ),
    "broken data": (
        FINETUNE, {"training": map(zero_division, [1])}, "a generator can be read once",
    ),
    # labels
    "no labels": (FINETUNE, {"training": UNLABELLED}, "no loss: pass loss=.*or batches with labels"),
    "no labels for alpha": ("distill{alpha=0.5}", {"training": UNLABELLED}, "no loss: pass loss="),
    "a label out of range": (
        FINETUNE, {"training": [(X, torch.tensor([0, 1, 2, 4]))]}, "a label is 4, and the model has 4 classes, 0 to 3",
    ),
    "a label below 0": (
        FINETUNE, {"training": [(X, torch.tensor([0, -1, 2, 3]))]}, "a label is -1, and .*-100 is for what is left out",
    ),
    "class weights": (
        "finetune{class_weights=[1,2]}", {"training": LABELLED}, "class_weights are 2 numbers, and the model has 4",
    ),
    "smoothing of an own loss": (
        "finetune{label_smoothing=0.1}", {"training": LABELLED, "loss": lambda outputs, batch: outputs.mean()},
        "label_smoothing is of the built-in cross-entropy, and loss= is your own: leave one of them out",
    ),
    "smoothing without a loss to labels": (
        "distill{label_smoothing=0.1}", {"training": LABELLED}, "are of the loss to labels: give it a weight, alpha",
    ),
    # the loss and the metric
    "a loss that fails": (
        FINETUNE, {"training": LABELLED, "loss": zero_division}, "your loss function failed: ZeroDivisionError",
    ),
    "a loss of each sample": (
        FINETUNE, {"training": LABELLED, "loss": lambda outputs, batch: outputs},
        r"your loss function gives a tensor of \[4, 4\]; give a tensor of one number, the mean over the batch",
    ),
    "a loss that is NaN": (
        FINETUNE, {"training": LABELLED, "loss": lambda outputs, batch: outputs.sum() * math.nan},
        "finetune: the loss is nan at step 1, with a learning rate of .*, before anything was trained: look at",
    ),
    "a loss that is infinite": (
        FINETUNE, {"training": LABELLED, "loss": lambda outputs, batch: outputs.sum() + math.inf},
        "finetune: the loss is inf at step 1, with a learning rate of .*, before anything was trained: look at",
    ),
    "a loss without a gradient": (
        FINETUNE, {"training": LABELLED, "loss": lambda outputs, batch: outputs.sum().detach()},
        "finetune: the loss has no gradient with respect to any parameter",
    ),
    "a metric that fails": (
        FINETUNE, {"training": LABELLED, "evaluate": zero_division}, "your evaluate function failed: ZeroDivisionError",
    ),
    "a metric that is NaN": (
        FINETUNE, {"training": LABELLED, "evaluate": lambda model: math.nan}, "evaluate gives NaN at step 0",
    ),
    "no metric": (
        FINETUNE, {"training": LABELLED, "evaluate": lambda model: None}, "evaluate gives None; give one number",
    ),
    "patience without a metric": (
        "finetune{patience=2}", {"training": LABELLED}, "finetune: patience is about evaluations, and there are none",
    ),
    "evaluations without a metric": (
        "distill{evaluate_every=2}", {"training": UNLABELLED}, "evaluate_every is about evaluations, and there are no",
    ),
    "no memory": (
        "finetune{accumulate=2}", {"training": LABELLED, "loss": no_memory},
        "finetune: out of memory with batches of 4: give batches of 2 with accumulate=4, .* or amp=bfloat16",
    ),
    # what is trained
    "all frozen": (
        "finetune{freeze=linear}", {"training": LABELLED}, r"no parameter is left to train \(freeze=linear\)",
    ),
    "a path that is not there": (
        'finetune{freeze="encoder"}', {"training": LABELLED}, "'encoder' selects no site of the model; there are 0, 1",
    ),
    "nothing with weights frozen": (
        "finetune{freeze=relu}", {"training": LABELLED}, "finetune: freeze=relu selects no node with weights",
    ),
    # the teacher
    "a teacher with other outputs": (
        DISTILL, {"training": UNLABELLED, "teacher": module(6, 5)},
        r"the student's output output is \['batch', 4\], and the teacher's output is \['batch', 5\]: name the outputs",
    ),
    "a teacher of finetune": (
        FINETUNE, {"training": LABELLED, "teacher": module(6, 4)}, "teacher= is for distill, and finetune learns from",
    ),
    "a teacher in training mode": (
        DISTILL, {"training": UNLABELLED, "teacher": module(6, 4).train()},
        "the teacher is in training mode, and dropout would teach noise: call teacher.eval()",
    ),
    "outputs that are none": (
        "distill{outputs=[output, logits]}", {"training": UNLABELLED}, "the student returns output, and not logits",
    ),
    "no blocks": (
        "distill{hidden=1}", {"training": UNLABELLED}, "no block with one path.*give match={student",
    ),
    "a module that is not there": (
        "distill{hidden=1 match={encoder=0}}", {"training": UNLABELLED}, "match: the student has no module 'encoder'",
    ),
    "a module of the teacher that is not there": (
        "distill{hidden=1 match={0=encoder}}", {"training": UNLABELLED}, "match: the teacher has no module 'encoder'",
    ),
    "no attention": ("distill{relations=1}", {"training": UNLABELLED}, "the student has none: give relations=0"),
    "match for nothing": ("distill{match={a=b}}", {"training": UNLABELLED}, "give hidden or relations a weight"),
    "nothing for the teacher": ("distill{alpha=1}", {"training": LABELLED}, "nothing to the teacher: use finetune"),
    "no GPU": ("finetune{device=cuda}", {"training": LABELLED}, "torch finds no GPU here: use device=cpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_trained(model: Optimized, case: str) -> None:
    passes, options, message = CASES[case]
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    before = {name: tensor.clone() for name, tensor in model.transformed.constants()}
    with pytest.raises(UsageError, match=message):
        optimize(model, passes, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.transformed.constants())


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("lr", 0, "a number above 0"), ("lr", -1e-4, "a number above 0"), ("temperature", 0, "a number above 0"),
        ("clip", 0, "a number above 0 or none"), ("minutes", 0, "a number above 0 or none"),
        ("epochs", 0, "a whole number of at least 1 or none"), ("steps", 0.5, "a whole number of at least 1 or none"),
        ("accumulate", 0, "a whole number of at least 1"), ("patience", 0, "a whole number of at least 1 or none"),
        ("warmup", 1, "a number of at least 0 and below 1"), ("alpha", 2, "a number of at least 0 and at most 1"),
        ("amp", "float8", "auto, bfloat16, float16 or off"), ("optimizer", "lion", "adamw or sgd"),
        ("label_smoothing", 1, "a number of at least 0 and below 1"), ("checkpoint_minutes", 0, "a number above 0"),
        ("evaluate_every", 0, "a whole number of at least 1 or none"), ("hidden", -1, "a number of at least 0"),
    ],
)  # fmt: skip
def test_options_out_of_range(option: str, value: Any, wanted: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"distill: {option} is {value!r}; give {wanted}")):
        graphopt.optimize(module(6, 4), f"distill{{{option}={value}}}", target="torch-cpu")


def test_batches_of_one_sample_and_a_batch_norm() -> None:
    with pytest.raises(UsageError, match=r"training batch 0 holds one sample, and norm is a batch norm, whose"):
        optimize(dropping(), FINETUNE, training=batches(1))
    with pytest.raises(UsageError, match=r"a training batch holds one sample.*drop_last=True"):
        optimize(dropping(), FINETUNE, training=batches(4, count=21))

    def one_by_one() -> Iterator[Any]:
        yield from batches(1)

    with pytest.raises(UsageError, match=r"a training batch holds one sample"):
        optimize(dropping(), "finetune{steps=2}", training=one_by_one())


class Hard(nn.Module):
    """Its output has no gradient: it is where something is above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return (y > 0).float()


def test_a_node_without_a_gradient_is_named() -> None:
    with pytest.raises(UsageError, match=r"the loss has no gradient.*the first node without one is gt.*aten.gt.Scalar"):
        optimize(Hard().eval(), FINETUNE, training=LABELLED)


def test_a_loss_that_is_not_finite_later_leaves_the_best_weights(model: Optimized) -> None:
    calls = 0

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value = nn.functional.cross_entropy(outputs, batch[1])
        return value * math.nan if calls == 5 else value

    small = optimize(model, "finetune{epochs=2 lr=0.01}", training=LABELLED, loss=loss)
    (record,) = [one for one in small.report.passes if one.name == "finetune"]
    assert re.fullmatch(
        r"the loss is nan at step 5, with a learning rate of 0.00\d+: training stopped, and the weights of step 3 are "
        "kept", record.notes[0],
    )  # fmt: skip
    assert all(bool(tensor.isfinite().all()) for _, tensor in small.transformed.constants())


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (module(5, 4), r"teacher: Sequential fails on the example inputs \(input \[4, 6\]\)"),
        (3, "teacher: cannot capture a builtins.int; hand over an nn.Module"),
        ("/nowhere.onnx", "teacher: there is no file /nowhere.onnx"),
    ],
)
def test_what_is_no_teacher(model: Optimized, teacher: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        optimize(model, DISTILL, training=UNLABELLED, teacher=teacher)


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_pipeline_or_model(model: Optimized, tmp_path: Path) -> None:
    options: dict[str, Any] = {"training": LABELLED, "checkpoint": tmp_path / "folder"}
    optimize(model, FINETUNE, **options)
    other = graphopt.optimize(module(6, 7, 4), [], example_inputs=X, target="torch-cpu", agree=False)
    with pytest.raises(UsageError, match=r"belongs to another pipeline \(.*\): name another folder"):
        optimize(model, "finetune{epochs=2}", **options)
    with pytest.raises(UsageError, match=r"belongs to another model \(.*\): name another folder"):
        optimize(other, FINETUNE, **options)


def test_a_checkpoint_of_another_teacher(model: Optimized, tmp_path: Path) -> None:
    options: dict[str, Any] = {"training": UNLABELLED, "checkpoint": tmp_path}
    optimize(model, DISTILL, teacher=module(6, 4), **options)
    with pytest.raises(UsageError, match=r"is the checkpoint of another training .its model, its teacher"):
        optimize(model, DISTILL, teacher=module(6, 9, 4), **options)


class Nested(Instrument):
    """Starts a second run in the folder of the first, from within it."""

    def __init__(self, again: Any) -> None:
        self.again, self.error = again, ""

    def trained(self, line: Any) -> None:
        if not self.error:
            try:
                self.again()
            except GraphoptError as error:
                self.error = str(error)


def test_a_folder_in_use(model: Optimized, tmp_path: Path) -> None:
    def again() -> Optimized:
        return optimize(model, FINETUNE, training=LABELLED, checkpoint=tmp_path)

    nested = Nested(again)
    optimize(model, FINETUNE, training=LABELLED, checkpoint=tmp_path, instruments=[nested])
    assert "is in use by another run: give each run a folder of its own" in nested.error


def test_a_folder_that_is_none(model: Optimized, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder, message in ((tmp_path, "is not empty .notes.txt., and no checkpoint: name another"),
                            (tmp_path / "notes.txt", "notes.txt' is a file: name a folder")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            optimize(model, FINETUNE, training=LABELLED, checkpoint=folder)
    assert [one.name for one in tmp_path.iterdir() if one.name != ".lock"] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_damaged_checkpoint(model: Optimized, tmp_path: Path) -> None:
    optimize(model, FINETUNE, training=LABELLED, checkpoint=tmp_path)
    (tmp_path / "0-finetune.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UsageError, match=r"0-finetune.safetensors is damaged .*: delete it to start again"):
        optimize(model, FINETUNE, training=LABELLED, checkpoint=tmp_path)
    (tmp_path / "graphopt.json").write_text("{")
    with pytest.raises(UsageError, match=r"holds a damaged graphopt.json: delete the folder, or name another"):
        optimize(model, FINETUNE, training=LABELLED, checkpoint=tmp_path)


def test_a_cache_that_cannot_be_used(model: Optimized, tmp_path: Path) -> None:
    passes = f'distill{{epochs=1 cache="{tmp_path / "cache"}"}}'
    optimize(model, passes, training=UNLABELLED)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"{}")
    with pytest.raises(UsageError, match=r"cache: .*safetensors is damaged .*: delete it"):
        optimize(model, passes, training=UNLABELLED)
    for file in (tmp_path / "cache").iterdir():
        save_file({"9": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match=r"cache: .*safetensors is damaged .*: delete it"):
        optimize(model, passes, training=UNLABELLED)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cache: .*cannot be written .*: name another folder"):
        optimize(model, f'distill{{epochs=1 cache="{tmp_path / "file"}"}}', training=UNLABELLED)
