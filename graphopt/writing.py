"""Files that are whole at any moment: written in a folder beside their place, and then moved there.

Large weights lie in a file beside the model's own, whose name holds the digest of its content. So a model and its
weights are never of two exports, and a file of weights that graphopt wrote is known by its name.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import mmap
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from graphopt.errors import GraphError, UsageError

MARK = ".graphopt-"
"""How the names of folders begin in which files are written; a process that is killed leaves one behind."""

_LONGEST = 255
"""Most bytes in the name of a file, on common file systems."""
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write the file `path`: it takes its place when the block ends, and is removed where the block fails.

    Links are followed. The file gets the mode of the one that it replaces, else that of a file which `open` makes.
    Further files that are written beside it are moved with it, before it.
    Raises GraphError where `path` cannot be a regular file (`why_not`), and OSError where the disk is full or the
    folder cannot be written; then nothing is left behind, and what was there stays.
    """
    with ExitStack() as stack:
        part = _begun(path, stack)
        yield part.file
        _move([part])


@contextmanager
def together(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """As `whole`, for files of one export: of several processes that write them, one moves all of its files at a time.

    What an earlier export left beside the first, and no file names any more, is removed (`remove_unused_data`).
    """
    with ExitStack() as stack:
        parts = [_begun(path, stack) for path in paths]
        yield tuple(part.file for part in parts)
        with _lock(parts[0].place):
            moved = _move(parts)
            with suppress(OSError):  # the export is done: what cannot be removed stays
                remove_unused_data(parts[0].place, keep={file.name for file in moved})


@contextmanager
def whole_folder(path: Path, mark: str, files: Callable[[], Sequence[str]]) -> Iterator[Path]:
    """Where to write the folder `path`: it takes its place when the block ends, and is removed where the block fails.

    mark: a file that every such folder holds. files: gives patterns of the other files of the folder that is there, in
    which * matches / too; it is asked again before that folder is replaced, as another process may have written it
    meanwhile. It is replaced as a whole, where it is empty or holds the mark and no other files than these; for a
    moment between two renames there is none. Links are followed.
    Raises GraphError for anything else in its place, and where there is no folder to write it in.
    """
    if reason := why_not_folder(path, mark, files()):
        raise GraphError(reason)
    place = path.resolve()
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=MARK) as around:
        part = Path(around) / place.name
        part.mkdir()
        yield part
        with _lock(place):
            if reason := why_not_folder(path, mark, files()):  # of what was put there meanwhile
                raise GraphError(reason)
            if place.exists():
                place.rename(Path(around) / "before")
            part.rename(place)


def into_place(part: Path, place: Path) -> None:
    """Give a folder, which several processes have written under a temporary name, the name that nothing has yet."""
    os.replace(part, place)


def why_not(path: Path) -> str:
    """Why no file can be written at `path`, and what to do; empty where one can."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            return f"{path} is a link to {os.readlink(path)}, which is not there: name another file"
        return "" if path.parent.is_dir() else f"there is no folder {path.parent}; make it first"
    except NotADirectoryError:
        return f"there is no folder {path.parent}; make it first"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return f"{path} is a link that leads back to itself: name another file"
    if stat.S_ISDIR(mode):
        return f"{path} is a folder; name another file"
    kind = _KINDS.get(stat.S_IFMT(mode))
    return f"{path} is {kind}, which is never overwritten; name another file" if kind else ""


def manifest_of(path: Path) -> Path:
    """The file beside `path` that says how it was made. Raises UsageError where `path` has no name of its own."""
    if path.name in ("", ".."):
        raise UsageError(f"{path} has no name of its own: write to a file or folder in it, such as {path / 'small'}")
    return path.with_name(path.name + ".json")


def why_not_folder(path: Path, mark: str, files: Sequence[str]) -> str:
    """Why no folder can be written at `path` (`whole_folder`), and what to do; empty where one can."""
    place = path.resolve()
    if not place.parent.is_dir():
        return f"there is no folder {path.parent}; make it first"
    if place.exists() and not place.is_dir():
        return f"{path} is a file; name a folder"
    if place.is_dir() and any(place.iterdir()) and not (place / mark).is_file():
        return f"{path} holds other files and no {mark}, so it is not replaced: name another folder"
    for file in sorted(place.rglob("*")) if place.is_dir() else ():
        name = file.relative_to(place).as_posix()
        is_kept = file.is_symlink() or not file.is_dir()
        if is_kept and name != mark and not any(fnmatch.fnmatchcase(name, pattern) for pattern in files):
            return f"{path} holds {name}, which was not written with it, so it is not replaced: name another folder"
    return ""


def place_of(path: Path) -> Path:
    """The file that is written where a user names `path`: links are followed. Raises GraphError for `why_not`."""
    if reason := why_not(path):
        raise GraphError(reason)
    return path.resolve() if path.is_symlink() else path


def data_name(name: str, digest: str) -> str:
    """The name of the file with the weights of the model that is called `name`. digest: see `digest_of`."""
    end = f".{digest}.data"
    return name.encode()[: _LONGEST - len(end)].decode(errors="ignore") + end


def digest_of(file: Path) -> str:
    """128 bits of the SHA-256 of a file's content, in hexadecimal."""
    return sha256_of(file)[:32]


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def remove_unused_data(path: Path, keep: set[str]) -> None:
    """Remove the files of weights that earlier exports to `path` left beside it, which no model reads any more.

    A file is removed only where its name is `data_name` of `path` and of its own content, so that graphopt wrote it and
    nobody changed it, and where no other file with the suffix of `path` holds its name. keep: names of files that stay.
    """
    start, end = data_name(path.name, "*" * 32).split("*" * 32)
    pattern = re.compile(f"{re.escape(start)}([0-9a-f]{{32}}){re.escape(end)}")
    unused = []
    for file in path.parent.iterdir():
        named = pattern.fullmatch(file.name)
        if named and file.name not in keep and not file.is_symlink() and file.is_file() and digest_of(file) == named[1]:
            unused.append(file)
    if unused:
        models = [one for one in path.parent.iterdir() if one.suffix == path.suffix and one.is_file()]
        for file in unused:
            if not any(_holds(model, file.name) for model in models):
                file.unlink(missing_ok=True)


def _holds(file: Path, text: str) -> bool:
    """Whether a file's content holds a text."""
    with file.open("rb") as opened:
        if os.fstat(opened.fileno()).st_size == 0:
            return False
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(text.encode()) >= 0


@dataclass(frozen=True)
class _Part:
    """A file that is being written, in a folder of its own."""

    file: Path
    place: Path
    mode: int
    """Of a file that `open` makes: that of `file` may become another, as some libraries write through one of theirs."""


def _begun(path: Path, stack: ExitStack) -> _Part:
    """An empty file beside its place; `stack` removes its folder."""
    place = place_of(path)
    try:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=place.parent, prefix=MARK))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place.parent)) from error
    file = Path(folder) / place.name
    file.touch()
    return _Part(file, place, file.stat().st_mode)


def _move(parts: Sequence[_Part]) -> list[Path]:
    """Move each file, and before it what was written beside it; returns their places.

    Where that fails, files that replaced none are removed again.
    """
    moves: list[tuple[Path, Path]] = []
    for part in parts:
        mode = stat.S_IMODE(part.place.stat().st_mode if part.place.exists() else part.mode)
        for file in (*sorted(one for one in part.file.parent.iterdir() if one != part.file), part.file):
            file.chmod(mode)
            moves.append((file, part.place.with_name(file.name)))
    made: list[Path] = []
    try:
        for file, place in moves:
            is_new = not place.exists()
            file.replace(place)
            made += [place] if is_new else []
    except BaseException:
        for place in made:
            place.unlink(missing_ok=True)
        raise
    return [place for _, place in moves]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time, for one path."""
    file = path.with_name(f"{MARK}{hashlib.sha256(path.name.encode()).hexdigest()[:16]}.lock")
    with filelock.FileLock(file, mode=0o666):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # under the lock: whoever waits for it finds it gone, and makes another
