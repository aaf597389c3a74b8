"""A training on disk: what a later call needs to go on as if nothing had happened. No pickles.

A folder belongs to one pipeline on one model. It holds a file for each training pass, safetensors with JSON in its
metadata and a digest of both, which is whole at any moment (`graphopt.writing`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt import writing
from graphopt.errors import UsageError, first_line
from graphopt.ir.graph import Graph, digest, raw_bytes, tensors_digest
from graphopt.pipeline.batches import Batch
from graphopt.training import precision, streams
from graphopt.training.meshes import shards
from graphopt.training.outcome import Best

if TYPE_CHECKING:
    from graphopt.training.loop import Trainer

_IDENTITY = "graphopt.json"


@contextmanager
def held(folder: Path, identity: Mapping[str, str]) -> Iterator[None]:
    """Make a folder ready for one run, which no other process may use meanwhile.

    identity: of what is run (the pipeline, the model), by name. Raises UsageError where the folder is in use, holds
    something else, is of another run, or cannot be written.
    """
    where = f"checkpoint={str(folder)!r}"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{where} is a file: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"{where} is in use by another run: give each run a folder of its own") from None
    except OSError as error:
        raise _unwritable(where, error) from error
    try:
        _claim(folder, where, identity)
        for unfinished in folder.glob(f"{writing.MARK}*"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        yield
    finally:
        lock.release()


def _claim(folder: Path, where: str, identity: Mapping[str, str]) -> None:
    """Write whose a new folder is; of one that was used before, require that it is the same run's."""
    file = folder / _IDENTITY
    others = [one.name for one in folder.iterdir() if one.name not in (".lock", file.name)]
    others = [name for name in others if not name.startswith(writing.MARK)]
    if file.exists():
        _require_same(where, file, identity)
        return
    if others:
        raise UsageError(f"{where} is not empty ({', '.join(sorted(others)[:3])}), and no checkpoint: name another")
    try:
        with writing.whole(file) as part:
            part.write_text(json.dumps(dict(identity), indent=2), encoding="utf-8")
    except OSError as error:
        raise _unwritable(where, error) from error


def _unwritable(where: str, error: Exception) -> UsageError:
    said = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    return UsageError(f"{where} cannot be written ({said}): make room there, or name a folder that can be written")


def _require_same(where: str, file: Path, identity: Mapping[str, str]) -> None:
    try:
        known = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"{where} holds a damaged {file.name}: delete the folder, or name another") from error
    for name, value in identity.items():
        if known.get(name) != value:
            raise UsageError(
                f"{where} belongs to another {name} ({known.get(name)}, and now it is {value}): name another folder"
            )


class Checkpoints:
    """The checkpoints of one training pass: `file` holds the latest."""

    def __init__(self, file: Path, graph: Graph, minutes: float) -> None:
        """graph: as the training finds it. minutes: between checkpoints."""
        self.file, self.minutes = file, minutes
        self.key = digest(graph)
        self._written = time.monotonic()
        self._seen = hashlib.sha256()
        self._expected = ""
        """The digest of the batches that an earlier session saw of this epoch."""

    # --- batches -----------------------------------------------------------------------------------------------------

    def saw(self, batches: Iterable[Batch]) -> None:
        """Batches were read: their content is a part of the digest of this epoch."""
        for batch in batches:
            for path, leaf in pytree.tree_leaves_with_path((dict(sorted(batch.feeds.items())), batch.labels)):
                self._seen.update(pytree.keystr(path).encode())
                self._seen.update(raw_bytes(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())

    def new_epoch(self) -> None:
        self._seen = hashlib.sha256()

    def skipped(self, notes: list[str]) -> None:
        """The batches that an earlier session saw were read again: note where they are not the same."""
        if self._expected and self._seen.hexdigest() != self._expected:
            notes.append(
                "the training data does not repeat itself under one seed: this is not what an unbroken run would be"
            )
        self._expected = ""

    # --- writing -----------------------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is `minutes` old."""
        return time.monotonic() - self._written >= 60 * self.minutes

    def write(self, trainer: Trainer, *, is_done: bool = False) -> None:
        """Write all that `resume` reads, and the steps and evaluations so far as JSON lines.

        Raises UsageError where the disk is full or the folder cannot be written.
        """
        tensors, facts = _state(trainer)
        mesh, folder = trainer.mesh, self.file.parent
        if mesh is None:
            self._write(trainer, tensors, facts, is_done)
        else:
            try:
                files = shards.write(folder, self.file.stem, mesh, _stored(trainer, tensors))
            except OSError as error:
                raise _unwritable(f"the checkpoint {self.file}", error) from error
            mesh.first(lambda: self._write(trainer, {}, facts | {"shards": files}, is_done))
        self._written = time.monotonic()

    def _write(self, trainer: Trainer, tensors: dict[str, Tensor], facts: dict[str, Any], is_done: bool) -> None:
        facts |= {**self._whose(trainer), "seen": self._seen.hexdigest(), "done": is_done}
        stored, text = {name: one.cpu().contiguous() for name, one in tensors.items()}, json.dumps(facts)
        try:
            with writing.whole(self.file) as part:
                save_file(stored, part, {"graphopt": text, "digest": tensors_digest(stored, text)})
            with writing.whole(self.file.with_suffix(".jsonl")) as part:
                part.write_text("".join(f"{json.dumps(one)}\n" for one in trainer.outcome.lines), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise _unwritable(f"the checkpoint {self.file}", error) from error
        shards.forget(self.file.parent, self.file.stem, facts.get("shards", {}))

    # --- reading -----------------------------------------------------------------------------------------------------

    def resume(self, trainer: Trainer) -> bool:
        """Bring a trainer to where an earlier session was; whether there was one.

        Raises UsageError for a checkpoint of another training, and for a damaged one.
        """
        there = self.file.exists()
        if trainer.mesh is not None:
            trainer.mesh.require_same(f"whether {self.file} is there", there, "give a folder that all machines share")
        leads = trainer.mesh is None or trainer.mesh.leads
        if not there:
            if leads:
                self._forget_later()
            return False
        tensors, facts = self._read()
        files, part = facts.get("shards", {}), trainer.spread.part
        spread_anew = facts.get("parts") != trainer.parts
        of_a_step = trainer.parts * trainer.settings.accumulate
        is_other = facts.get("parts", 1) * facts.get("accumulate", 0) != of_a_step
        if is_other or any(facts.get(name) != value for name, value in self._whose(trainer).items()):
            raise UsageError(
                f"{self.file} is the checkpoint of another training (its model, its teacher, its calibration or its "
                "options differ): name another folder, or delete it"
            )
        try:
            parts = {name: part(shards.like(name), one) for name, one in tensors.items()}
            found = {name: one for name, one in parts.items() if one is not None}
            if files:
                others = _streams_of_others(trainer, facts)
                found |= shards.read(self.file.parent, files, trainer.spread, without=others)
            _load(trainer, found, facts)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
            raise self._damaged(error) from error
        self._expected = "" if spread_anew else facts["seen"]
        if not trainer.is_done and leads:
            self._forget_later()
        trainer.outcome.notes.append(f"went on from step {trainer.step}, at {self.file.name}")
        return True

    def _whose(self, trainer: Trainer) -> dict[str, str]:
        settings = replace(trainer.settings, accumulate=1)  # ranks may take what one process accumulates
        return {"key": self.key, "objective": trainer.objective.key, "settings": str(settings)}

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            with safe_open(self.file, "pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
            if metadata["digest"] != tensors_digest(tensors, metadata["graphopt"]):
                raise ValueError("its digest is another")
            return tensors, dict(json.loads(metadata["graphopt"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UsageError:
        return UsageError(f"{self.file} is damaged ({first_line(error)}): delete it to start again")

    def _forget_later(self) -> None:
        """Delete the checkpoints of later passes: where this one goes on after an interruption, they are of weights
        that it does not end with."""
        for other in self.file.parent.glob("*.safetensors"):
            if _place(other) > _place(self.file):
                other.unlink()
                shards.forget(other.parent, other.stem, {})


def _place(file: Path) -> int:
    """Of a training pass in its pipeline, by which its file is named."""
    return int(file.name.partition("-")[0])


def _state(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that decides how a training goes on: the tensors by name that this rank has a part of, and plain data."""
    parts = {f"module/{name}": one.detach().clone() for name, one in trainer.spread.tensors.items()}
    parts |= {f"best/{name}": one for name, one in trainer.best.state.items()}
    for name, parameter in trainer.named().items():
        for key, one in trainer.optimizer.state.get(parameter, {}).items():
            if isinstance(one, Tensor):
                parts[f"optimizer/{name.removeprefix('module/')}/{key}"] = one
    parts |= {f"objective/{name}": one.detach().clone() for name, one in trainer.objective.state_dict().items()}
    for held, rule in trainer.rules.items():
        parts |= {f"rule/{held}/{name}": one.detach().clone() for name, one in rule.state_dict().items()}
    if not trainer.spread.has_loss:  # another rank has trained what the objective learns
        parts = {name: one for name, one in parts.items() if not _is_of_objective(name)}
    stream = _stream_of(0 if trainer.mesh is None else trainer.mesh.rank)
    parts |= {f"{stream}{name}": one for name, one in streams.as_tensors(trainer.model_stream.state).items()}
    best = trainer.best
    facts = {
        "step": trainer.step, "epoch": trainer.epoch, "seconds": trainer.seconds(),
        "steps of the epoch": -(-trainer.seen // trainer.settings.accumulate),
        "evaluated at": trainer.evaluated_at, "notes": trainer.outcome.notes,
        "best": {"metric": best.metric, "step": best.step, "settled": best.settled, "waited": best.waited},
        "lines": trainer.outcome.lines, "amp": trainer.amp.name, "scaler": trainer.amp.scaler.state_dict(),
        "mesh": str(trainer.mesh), "parts": trainer.parts, "accumulate": trainer.settings.accumulate,
    }  # fmt: skip
    return parts, facts


def _stream_of(rank: int) -> str:
    """How the names of the random states of a rank begin."""
    return f"random/{rank}/"


def _stream_for(trainer: Trainer, facts: Mapping[str, Any]) -> str | None:
    """Whose random states this rank goes on with: its own on the same mesh, else those of rank 0 where it has the same
    batches, else none."""
    mesh = trainer.mesh
    if mesh is not None and facts["mesh"] == str(mesh):
        return _stream_of(mesh.rank)
    has_its_batches = facts["parts"] == trainer.parts and (mesh is None or not mesh.data_index)
    return _stream_of(0) if has_its_batches else None


def _streams_of_others(trainer: Trainer, facts: Mapping[str, Any]) -> Callable[[str], bool]:
    """Tells the names of random states that this rank has no use for."""
    own = _stream_for(trainer, facts)
    return lambda name: name.startswith("random/") and (own is None or not name.startswith(own))


def _is_of_objective(name: str) -> bool:
    """Whether a tensor of a checkpoint is what the objective learns, or the optimizer's state of it."""
    return name.startswith(("objective/", "optimizer/objective/"))


def _stored(trainer: Trainer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this rank writes, as torch.distributed.checkpoint takes it."""
    whole = {name: one for name, one in parts.items() if name.startswith(("objective/", "rule/", "random/"))}
    by_kind: dict[tuple[str, str], dict[str, Tensor]] = {("module", ""): {}, ("best", ""): {}}
    by_kind |= {("optimizer", f"/{key}"): {} for key in _OPTIMIZERS[trainer.settings.optimizer]}
    for name, part in parts.items():
        if name not in whole:
            kind = name.partition("/")[0]
            end = f"/{name.rpartition('/')[2]}" if kind == "optimizer" else ""
            by_kind[kind, end][shards.like(name)] = part
    return whole | {
        f"{kind}/{name}{end}": one
        for (kind, end), several in by_kind.items() for name, one in trainer.spread.stored(several).items()
    }  # fmt: skip


def _load(trainer: Trainer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    def named(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}

    with torch.no_grad():
        module = named("module/")
        for name, one in trainer.spread.tensors.items():
            if name in module or name in trainer.parameters:
                one.copy_(module[name])  # other constants may have no whole under tensor parallel, and don't change
    trainer.objective.load_state_dict(named("objective/"))
    for parameter, rule in trainer.rules.items():
        rule.load_state_dict(named(f"rule/{parameter}/"))
    _load_optimizer(trainer, named("optimizer/"))
    trainer.step, trainer.epoch = facts["step"], facts["epoch"]
    trainer.seen = facts["steps of the epoch"] * trainer.settings.accumulate
    trainer.spent, trainer.evaluated_at = facts["seconds"], facts["evaluated at"]
    best = named("best/")
    state = {name: best[name].to(one.device) if name in best or name in trainer.parameters else one.detach().clone()
             for name, one in trainer.now()}  # fmt: skip
    trainer.best = Best(state, **facts["best"])
    trainer.outcome.lines, trainer.outcome.notes = facts["lines"], facts["notes"]
    trainer.is_done = facts["done"]
    trainer.amp = precision.Amp(facts["amp"], trainer.device)
    trainer.amp.scaler.load_state_dict(facts["scaler"])
    if (stream := _stream_for(trainer, facts)) is not None:
        trainer.model_stream.state = streams.from_tensors(named(stream))


def _load_optimizer(trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    """The state of the optimizer, by the names of what it changes."""
    state = trainer.optimizer.state_dict()
    trained = [one for group in trainer.optimizer.param_groups for one in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    places = dict(zip(trained, numbers, strict=True))
    found: dict[int, dict[str, Tensor]] = {}
    for name, parameter in trainer.named().items():
        known = name.removeprefix("module/")
        for key in _OPTIMIZERS[trainer.settings.optimizer]:
            if (one := tensors.get(f"{known}/{key}")) is not None:
                found.setdefault(places[parameter], {})[key] = one
    trainer.optimizer.load_state_dict({**state, "state": found})


_OPTIMIZERS = {"adamw": ("exp_avg", "exp_avg_sq", "step"), "sgd": ("momentum_buffer",)}
"""What each optimizer keeps of a parameter."""
