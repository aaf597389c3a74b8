"""Checkpoints: a training that was stopped at any moment ends as one that was not, bit for bit."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from graphopt import writing
from graphopt.errors import UsageError
from graphopt.ir.graph import Graph
from graphopt.training import checkpoints, streams
from graphopt.training.checkpoints import held
from graphopt.training.loop import Trainer
from graphopt.training.objective import Labels
from graphopt.training.outcome import Outcome
from tests.training.networks import (
    Noisy,
    Stop,
    Stopped,
    accuracy,
    batches,
    dropping_graph,
    perceptron,
    same,
    samples,
    shuffled,
    trainer,
)
from tests.training.test_loop import Interrupt, Poisoned

GRAPHS: dict[str, Callable[[], Graph]] = {"perceptron": perceptron, "dropping": dropping_graph}


def resumed(graph: Graph, file: Path, stops: list[int], make: Callable[..., Trainer]) -> Outcome:
    """A training that crashes after each of these steps, and then runs to its end."""
    for step in stops:
        with pytest.raises(Stopped):
            make(graph, checkpoint=file, watchers=[Stop(step)]).run()
    return make(graph, checkpoint=file).run()


@settings(deadline=None, max_examples=10)
@given(
    graph=st.sampled_from(sorted(GRAPHS)),
    stops=st.lists(st.integers(1, 11), min_size=1, max_size=3, unique=True).map(sorted),
    optimizer=st.sampled_from(["adamw", "sgd"]),
    size=st.sampled_from([2, 4]),
    evaluate=st.sampled_from([None, accuracy]),
    evaluate_every=st.sampled_from([None, 4]),
    amp=st.sampled_from(["off", "off", "bfloat16", "float16"]),
)
def test_a_crash_at_any_step_changes_nothing(
    graph: str, stops: list[int], evaluate: Any, size: int, **options: Any
) -> None:
    def make(trained: Graph, **more: Any) -> Trainer:
        data = shuffled(size, Noisy())
        return trainer(trained, data, epochs=2, accumulate=4 // size, evaluate=evaluate, **options, **more)

    unbroken, broken = GRAPHS[graph](), GRAPHS[graph]()
    expected = make(unbroken).run()
    with tempfile.TemporaryDirectory() as folder:
        found = resumed(broken, Path(folder) / "0-finetune.safetensors", stops, make)
    assert same(unbroken, broken)
    assert (found.lines, found.steps, found.metric) == (expected.lines, expected.steps, expected.metric)
    steps = ", ".join(f"went on from step {step - 1}" for step in stops if step > 1)
    assert ", ".join(note.split(", at")[0] for note in found.notes if "went on" in note) == steps


def test_a_crash_after_the_last_step_evaluates_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoints.Checkpoints.write

    def crash_at_the_end(self: Any, trained: Trainer, *, is_done: bool = False) -> None:
        if is_done:
            raise Stopped
        write(self, trained)

    file = tmp_path / "0-finetune.safetensors"
    options: dict[str, Any] = {"epochs": 1, "evaluate": accuracy, "evaluate_every": 3}
    expected = trainer(perceptron(), batches(), **options).run()
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(checkpoints.Checkpoints, "write", crash_at_the_end)
        trainer(perceptron(), batches(), checkpoint=file, **options).run()
    assert trainer(perceptron(), batches(), checkpoint=file, **options).run().lines == expected.lines


def test_a_training_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    file, unbroken, again = tmp_path / "0-finetune.safetensors", perceptron(), perceptron()
    trainer(unbroken, batches(), epochs=1, checkpoint=file).run()

    def not_again(outputs: Any, batch: Any) -> torch.Tensor:
        raise AssertionError("this step was done before")

    outcome = trainer(again, batches(), epochs=1, checkpoint=file, loss=not_again).run()
    assert same(unbroken, again) and outcome.steps == 6
    assert outcome.notes == ["went on from step 6, at 0-finetune.safetensors"]


def test_a_training_that_diverged_stays_where_it_ended(tmp_path: Path) -> None:
    file, first, again = tmp_path / "0-finetune.safetensors", perceptron(), perceptron()
    trainer(first, batches(), epochs=1, loss=Poisoned(4, float("nan")), checkpoint=file).run()
    outcome = trainer(again, batches(), epochs=1, checkpoint=file).run()
    assert same(first, again)
    assert outcome.notes[0].endswith("training stopped, and the weights of step 2 are kept")


def test_data_that_do_not_repeat_themselves_are_noted(tmp_path: Path) -> None:
    own = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(*samples()), batch_size=4, shuffle=True, generator=own)
    file, graph = tmp_path / "0-finetune.safetensors", perceptron()
    outcome = resumed(graph, file, [3], lambda graph, **more: trainer(graph, loader, epochs=1, **more))
    assert outcome.notes[-1] == (
        "the training data does not repeat itself under one seed: this is not what an unbroken run would be"
    )
    assert outcome.steps == 6


@pytest.mark.parametrize("evaluate", [None, accuracy])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_same_call_goes_on_after_ctrl_c(tmp_path: Path, evaluate: Any, accumulate: int) -> None:
    options: dict[str, Any] = {"epochs": 4, "evaluate": evaluate, "accumulate": accumulate}
    file, unbroken, first, second = tmp_path / "0-finetune.safetensors", *(dropping_graph() for _ in range(3))
    expected = trainer(unbroken, shuffled(), **options).run()
    later = tmp_path / "1-finetune.safetensors"
    interrupted = trainer(first, shuffled(), checkpoint=file, watchers=[Interrupt(5)], **options).run()
    trainer(first, shuffled(), checkpoint=later, **options).run()
    assert interrupted.steps == 5 and not same(first, unbroken)
    found = trainer(second, shuffled(), checkpoint=file, **options).run()
    assert same(second, unbroken) and found.metric == expected.metric
    assert not later.exists()  # it was of weights that the first training does not end with


def test_ctrl_c_while_batches_are_read_ends_before_the_next_step(tmp_path: Path) -> None:
    def breaking() -> Any:
        yield from batches()[:5]
        raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")

    graph = perceptron()
    outcome = trainer(graph, breaking(), steps=6, accumulate=2, watchers=[Interrupt(2)]).run()
    assert outcome.steps == 2
    with pytest.raises(UsageError, match="your training batches failed: RuntimeError: DataLoader worker"):
        trainer(perceptron(), breaking(), steps=6, accumulate=2).run()


# --- moments of a write --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["within the file", "before it is renamed", "after it was renamed"])
def test_a_crash_within_a_write(tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, unbroken, broken = tmp_path / "0-finetune.safetensors", dropping_graph(), dropping_graph()
    trainer(unbroken, shuffled(), epochs=1).run()
    save, rename, writes = safetensors.torch.save_file, Path.replace, 0

    def saved(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal writes
        writes += 1
        save(tensors, path, metadata)
        if writes == 4 and moment == "within the file":
            path.write_bytes(path.read_bytes()[:1000])
            raise Stopped

    def replaced(part: Path, whole: Any) -> Any:
        if writes == 4 and moment == "before it is renamed":
            raise Stopped
        result = rename(part, whole)
        if writes == 4 and moment == "after it was renamed":
            raise Stopped
        return result

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_file", saved)
        patched.setattr(Path, "replace", replaced)
        # which a process that is killed does not reach
        patched.setattr(TemporaryDirectory, "__exit__", lambda *args: None)
        with pytest.raises(Stopped):
            trainer(broken, shuffled(), epochs=1, checkpoint=file).run()
    outcome = trainer(broken, shuffled(), epochs=1, checkpoint=file).run()
    assert same(unbroken, broken)
    assert outcome.notes == [f"went on from step {4 if moment.startswith('after') else 3}, at {file.name}"]
    left = {one.name for one in tmp_path.iterdir() if not one.name.startswith(writing.MARK)}
    assert left == {file.name, file.with_suffix(".jsonl").name}


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file, unbroken, broken = tmp_path / "0-finetune.safetensors", perceptron(), perceptron()
    with monkeypatch.context() as patched, pytest.raises(UsageError, match=r"No space left on device.*make room"):
        patched.setattr(checkpoints, "save_file", full)
        trainer(broken, batches(), epochs=1, checkpoint=file).run()
    with monkeypatch.context() as patched, pytest.raises(UsageError, match=r"No space left on device.*make room"):
        patched.setattr(Path, "write_text", full)
        claim(tmp_path / "folder", {})
    trainer(unbroken, batches(), epochs=1).run()
    trainer(broken, batches(), epochs=1, checkpoint=file).run()
    assert same(unbroken, broken)


# --- what is no checkpoint of this training ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("written") / "0-finetune.safetensors"
    with pytest.raises(Stopped):
        trainer(perceptron(), batches(), epochs=1, checkpoint=file, watchers=[Stop(3)]).run()
    return file


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_damaged_file(written: Path, data: st.DataObject) -> None:
    content = bytearray(written.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as folder:
        damaged = Path(folder) / "0-finetune.safetensors"
        damaged.write_bytes(content)
        with pytest.raises(UsageError, match=r"0-finetune.safetensors is damaged \(.*\): delete it to start again"):
            trainer(perceptron(), batches(), epochs=1, checkpoint=damaged).run()


def test_of_another_training(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "is the checkpoint of another training .*: name another folder, or delete it"
    with pytest.raises(UsageError, match=message):
        trainer(dropping_graph(), batches(), epochs=1, checkpoint=written).run()
    with pytest.raises(UsageError, match=message):
        trainer(perceptron(), batches(), epochs=1, seed=1, checkpoint=written).run()
    monkeypatch.setattr(Labels, "key", "of another teacher")
    with pytest.raises(UsageError, match=message):
        trainer(perceptron(), batches(), epochs=1, checkpoint=written).run()


def test_random_states_of_a_machine_with_more_gpus(written: Path) -> None:
    torch_state, numpy_state, python_state, cuda = streams.get_state()
    streams.set_state((torch_state, numpy_state, python_state, [*cuda, torch_state]))


# --- the folder ----------------------------------------------------------------------------------------------------

IDENTITY = {"pipeline": "finetune", "model": "0123"}


def claim(folder: Path, identity: dict[str, str]) -> None:
    with held(folder, identity):
        pass


def test_a_folder_is_one_runs(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        with held(folder, IDENTITY):
            (folder / "0-finetune.safetensors").touch()
    assert json.loads((folder / "graphopt.json").read_text()) == IDENTITY
    with pytest.raises(UsageError, match=r"belongs to another model \(0123, and now it is 4567\): name another folder"):
        claim(folder, {**IDENTITY, "model": "4567"})
    with pytest.raises(UsageError, match=r"belongs to another pipeline \(finetune, and now it is distill\)"):
        claim(folder, {**IDENTITY, "pipeline": "distill"})
    for damaged in ("", "[1]", "{", "\0"):
        (folder / "graphopt.json").write_text(damaged)
        with pytest.raises(UsageError, match=r"holds a damaged graphopt.json: delete the folder, or name another"):
            claim(folder, IDENTITY)


def test_a_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UsageError, match=r"is not empty \(thesis.txt\), and no checkpoint: name another"):
        claim(tmp_path, IDENTITY)
    with pytest.raises(UsageError, match=r"thesis.txt' is a file: name a folder"):
        claim(tmp_path / "thesis.txt", IDENTITY)
    with pytest.raises(UsageError, match=r"cannot be written .*: make room there, or name a folder that can"):
        claim(tmp_path / "thesis.txt" / "below", IDENTITY)

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(UsageError, match=r"cannot be written .Permission denied.: make room there, or name a folder"):
        claim(tmp_path / "read-only", IDENTITY)


def test_a_crash_before_the_folder_was_claimed(tmp_path: Path) -> None:
    (tmp_path / ".graphopt-killed").mkdir()
    (tmp_path / ".graphopt-killed" / "graphopt.json").write_text("{")
    (tmp_path / ".lock").touch()
    with held(tmp_path, IDENTITY):
        assert sorted(one.name for one in tmp_path.iterdir()) == [".lock", "graphopt.json"]


def test_a_folder_that_another_process_holds(tmp_path: Path) -> None:
    code = f"import filelock; lock = filelock.FileLock({str(tmp_path / '.lock')!r}); lock.acquire(timeout=0); print(1)"
    with held(tmp_path, IDENTITY):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "Timeout" in other.stderr and not other.stdout
    with subprocess.Popen([sys.executable, "-uc", f"{code}; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        with pytest.raises(UsageError, match="is in use by another run: give each run a folder of its own"):
            claim(tmp_path, IDENTITY)
        process.kill()
    claim(tmp_path, IDENTITY)
