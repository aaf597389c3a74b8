"""The processes of one run, in axes: `dp=2,tp=2` -> process groups, and what ranks tell each other."""

from __future__ import annotations

import itertools
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from graphopt.errors import RankError, UsageError, described, first_line, near

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others, where graphopt opens the process group: an evaluation on rank 0 may be long."""

RENDEZVOUS = timedelta(minutes=5)
"""How long a rank waits for the others to start, who are to come at once."""

_FAILED = "graphopt/failed"
"""In the store of the process group: what the first rank that failed has said."""


@dataclass(frozen=True)
class MeshSizes:
    """How many parts a run is cut into along each axis; the outermost axis first."""

    pp: int = 1
    """Stages of blocks, one behind the other."""
    dp: int = 1
    """Copies of the model, each with its share of the batches."""
    fsdp: int = 1
    """Shares of the batches, and of every weight, gradient and state of the optimizer."""
    tp: int = 1
    """Parts of each layer: its heads, neurons and channels."""

    @classmethod
    def parse(cls, text: str) -> MeshSizes:
        """Read "dp=2,tp=2". Raises UsageError, naming the part that is wrong."""
        names = [one.name for one in fields(cls)]
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"mesh is {text!r}; give axes and their sizes, such as dp=2 or dp=2,tp=2")
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = (one.strip() for one in part.partition("="))
            if name not in names:
                meant = near(name, names)
                hint = f"; did you mean {meant!r}?" if meant else ""
                raise UsageError(f"mesh={text!r}: {name!r} is no axis (there are dp, fsdp, tp, pp){hint}")
            if not size.isdecimal() or int(size) < 1:
                raise UsageError(f"mesh={text!r}: {name} is {size!r}; give a whole number, at least 1")
            if name in sizes:
                raise UsageError(f"mesh={text!r} gives {name} twice")
            sizes[name] = int(size)
        found = cls(**sizes)
        if len(cutting := [name for name in ("fsdp", "tp", "pp") if sizes.get(name, 1) > 1]) > 1:
            raise UsageError(
                f"mesh={text!r} cuts the model by {' and by '.join(cutting)}, and one of them is possible: give dp and "
                "one of fsdp, tp and pp, such as dp=2,tp=2"
            )
        return found

    @property
    def total(self) -> int:
        """How many processes it takes."""
        return math.prod(self.axes.values())

    @property
    def axes(self) -> dict[str, int]:
        """The sizes by name, outermost first."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes.items() if size > 1) or "dp=1"


def opened(text: str | None, choose: Callable[[int, int], MeshSizes] | None = None) -> Mesh | None:
    """The mesh of this run: None of a single process. Without a text, data parallel over all processes of torchrun.

    choose: what "auto" stands for, of the number of processes and the bytes of memory that each may use.
    Raises UsageError where the text is wrong, where it does not fit the number of processes, and where they do not
    find each other.
    """
    world = dist.get_world_size() if _is_open() else world_of_torchrun()
    if text == "auto" and choose is not None:
        if world == 1:
            return None
        if not _is_open():
            _open(world)
        told: list[Any] = [None] * world
        dist.all_gather_object(told, memory_of_process())
        return Mesh(choose(world, min(told)))
    sizes = MeshSizes(dp=world) if text is None else MeshSizes.parse(text)
    if sizes.total != world:
        there = "there is 1" if world == 1 else f"there are {world}"
        raise UsageError(
            f"mesh={str(sizes)!r} takes {sizes.total} processes, and {there}: start the program by "
            f"torchrun --nproc-per-node {sizes.total}, or give a mesh of {world}"
        )
    if world == 1:
        return None
    if not _is_open():
        _open(world)
    return Mesh(sizes)


def _is_open() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_of_torchrun() -> int:
    """How many processes torchrun has started; 1 without it."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"the environment has WORLD_SIZE={text!r}; torchrun sets it to the number of processes")
    return int(text)


def _open(world: int) -> None:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"the environment has WORLD_SIZE={world}, and no {' and no '.join(missing)}: {world} processes cannot find "
            f"each other; start them by torchrun --nproc-per-node {world}"
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        store, rank, count = next(rendezvous("env://", timeout=RENDEZVOUS))
        store.set_timeout(TIMEOUT)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=count, timeout=TIMEOUT
        )
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UsageError(
            f"{world} processes do not find each other at {where} ({described(error)}): start all of them by torchrun, "
            "with an address that each can reach"
        ) from error


class Mesh:
    """The processes of a run in the axes of its sizes. Fulfils `graphopt.pipeline.ranks.Ranks`."""

    def __init__(self, sizes: MeshSizes, accelerator: Any = None) -> None:
        """The process group must be open, and as large. accelerator: the user's accelerate.Accelerator, which wraps
        the module of a training."""
        self.sizes, self.rank, self.world = sizes, dist.get_rank(), dist.get_world_size()
        self.accelerator = accelerator
        axes = {name: size for name, size in sizes.axes.items() if size > 1} or {"dp": 1}
        self.devices: DeviceMesh = init_device_mesh(self.device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        coordinate: list[int] | tuple[int, ...] = self.devices.get_coordinate() or []
        self.place = dict.fromkeys(sizes.axes, 0) | dict(zip(axes, coordinate, strict=True))
        """Where this rank is along each axis."""
        self._data: list[str] = [name for name in ("dp", "fsdp") if name in axes]
        self._data_group = self._group_of(self._data)

    def __str__(self) -> str:
        return str(self.sizes)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def data_count(self) -> int:
        return self.sizes.dp * self.sizes.fsdp

    @property
    def data_index(self) -> int:
        index: int = self.place["dp"] * self.sizes.fsdp + self.place["fsdp"]
        return index

    @cached_property
    def device(self) -> torch.device:
        """Of this rank's GPU, or the CPU."""
        if self.accelerator is not None:
            return torch.device(self.accelerator.device)
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along one axis, which has more than one."""
        return self.devices.get_group(axis)

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that differ from this one by their batches alone; None where there is no other."""
        return self._data_group

    def _group_of(self, axes: list[str]) -> dist.ProcessGroup | None:
        if not axes:
            return None
        part = self.devices if axes == list(self.devices.mesh_dim_names or ()) else self.devices[tuple(axes)]
        return part.get_group() if len(axes) == 1 else part._flatten("data").get_group()

    # --- what ranks tell each other ----------------------------------------------------------------------------------

    def gather(self, one: T) -> list[T]:
        return self._gathered(one, None, self.world)

    def gather_data(self, one: T) -> list[T]:
        return [one] if self._data_group is None else self._gathered(one, self._data_group, self.data_count)

    def _gathered(self, one: T, group: dist.ProcessGroup | None, count: int) -> list[T]:
        found: list[Any] = [None] * count
        dist.all_gather_object(found, one, group=group)
        return found

    def first(self, make: Callable[[], T]) -> T:
        told: list[Any] = [None]
        failed: Exception | None = None
        if self.leads:
            try:
                told = [(make(), None)]
            except Exception as error:
                told, failed = [(None, described(error))], error
        dist.broadcast_object_list(told, src=0)
        value, said = told[0]
        if failed is not None:
            raise failed
        if said is not None:
            raise RankError(f"rank 0 failed: {said}")
        found: T = value
        return found

    def require_same(self, what: str, own: object, way_out: str) -> None:
        found = self.gather(own)
        other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            raise RankError(
                f"{what} differs between ranks: rank 0 has {found[0]}, and rank {other} has {found[other]}; {way_out}"
            )

    # --- failures ----------------------------------------------------------------------------------------------------

    @contextmanager
    def session(self) -> Iterator[None]:
        """A run of all ranks. A rank that fails tells the others why: those that wait for it, and find it gone, raise
        RankError with its traceback."""
        number = next(_sessions)
        try:
            yield
        except BaseException as error:
            if not _is_lost(error):
                self._tell(number, error)
                raise
            said = self._heard(number)
            if said is None:
                said = (
                    f"a process of the mesh {self} has ended, or does not answer ({first_line(error)}): look for the "
                    "error of the one that ended first; with a checkpoint, the same call goes on from there"
                )
            raise RankError(said) from error

    def _tell(self, number: int, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error)).strip()
        with suppress(RuntimeError):  # the process that holds the store has ended
            _store().compare_set(f"{_FAILED}/{number}", "", f"rank {self.rank} failed: {text}")

    def _heard(self, number: int) -> str | None:
        """What the first rank that failed has said; it may need a moment to say it."""
        with suppress(RuntimeError):
            for _ in range(20):
                if _store().check([f"{_FAILED}/{number}"]):
                    return bytes(_store().get(f"{_FAILED}/{number}")).decode()
                time.sleep(0.05)
        return None


_sessions = itertools.count()
"""Numbers the runs of this process, which are the same on all ranks."""


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def memory_of_process() -> int:
    """The bytes that this process may use: its share of the machine, or its GPU's."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return available // here


def _is_lost(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a connection that was closed or timed out."""
    if error is None:
        return False
    text = str(error)
    lost = isinstance(error, dist.DistError) or any(
        part in text for part in ("Connection closed by peer", "Timed out waiting", "Connection reset", "Broken pipe")
    )
    return lost or _is_lost(error.__cause__)
