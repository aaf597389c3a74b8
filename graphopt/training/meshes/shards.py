"""Tensors of a training that several processes write, each its own: torch.distributed.checkpoint, in safetensors.

What N processes have written, M read. The writer is torch's for Hugging Face, whose metadata lie in the files
themselves: nothing is pickled.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from graphopt import writing
from graphopt.training.meshes.mesh import Mesh
from graphopt.training.meshes.spread import Spread

SUFFIX = ".shards"
"""How the names of their folders end."""


def write(folder: Path, stem: str, mesh: Mesh, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write what each rank gives into a new folder beside others, whose name begins with a stem; every rank must call
    it. Returns the digest of each file, by its path in `folder`. Raises OSError where it cannot be written."""
    part = mesh.first(lambda: Path(tempfile.mkdtemp(prefix=writing.MARK, dir=folder)))
    with _quiet(), _as_os_error():
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True))
    return mesh.first(lambda: _placed(folder, stem, part))


@contextmanager
def _as_os_error() -> Iterator[None]:
    """torch raises what is no Exception where a rank cannot write or read."""
    try:
        yield
    except CheckpointException as error:
        raise OSError("; ".join(str(one[0]) for one in error.failures.values())) from error


def _placed(folder: Path, stem: str, part: Path) -> dict[str, str]:
    """Give a written folder its name."""
    free = (folder / f"{stem}.{number}{SUFFIX}" for number in range(len(list(folder.iterdir())) + 1))
    place = next(one for one in free if not one.exists())
    writing.into_place(part, place)
    return {str(file.relative_to(folder)): _digest(file) for file in sorted(place.iterdir())}


def read(
    folder: Path, files: Mapping[str, str], spread: Spread, *, without: Callable[[str], bool] = lambda name: False
) -> dict[str, Tensor]:
    """What this process has of the tensors in the files that `write` returned, without those of some names. Every rank
    must call it.

    Raises ValueError where a file has changed, and OSError where one is not there.
    """
    for name, digest in files.items():
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} has another digest")
    place = str((folder / next(iter(files))).parent)
    known = HuggingFaceStorageReader(place).read_metadata().state_dict_metadata
    blanks: dict[str, Tensor] = {}
    for name, one in known.items():
        if without(name):
            continue
        assert isinstance(one, TensorStorageMetadata)
        blank = spread.blank(like(name), one.size, one.properties.dtype)
        if blank is not None:
            blanks[name] = blank
    with _quiet(), _as_os_error():
        load(blanks, storage_reader=HuggingFaceStorageReader(place), no_dist=spread.mesh is None)
    found = {name: spread.loaded(like(name), blank) for name, blank in blanks.items()}
    return {name: one for name, one in found.items() if one is not None}


def like(name: str) -> str:
    """The parameter or buffer that a tensor of a checkpoint is like: module/x, best/x and optimizer/x/exp_avg -> x; all
    else is like none of the module, and keeps its name: objective/x."""
    kind, _, rest = name.partition("/")
    if kind == "optimizer":
        return rest.rpartition("/")[0]
    return rest if kind in ("module", "best") else name


def forget(folder: Path, stem: str, files: Mapping[str, str]) -> None:
    """Delete the folders of a stem that hold none of these files."""
    kept = {Path(name).parts[0] for name in files}
    for other in folder.glob(f"{stem}.*{SUFFIX}"):
        if other.name not in kept:
            shutil.rmtree(other, ignore_errors=True)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning of a single process, which is what is asked for there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield
