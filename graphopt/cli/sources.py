"""Where the command line takes batches from, in one syntax: an archive of arrays, a table of texts, or a function.

    data.npz   data.npz{batch=16}
    data.tsv{text=[question,sentence] label=label tokenizer=FOLDER batch=16 max_length=128}
    script.py:function
"""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.cli.reading import require_file
from graphopt.errors import UsageError, nearest, outer_door, require_positive_integer, user_code

if TYPE_CHECKING:
    from torch import Tensor

SYNTAX = "\n\n".join((
    "A SOURCE of batches is one of:",
    "data.npz: one array per input, samples along axis 0, labels beside them; data.npz{batch=16} cuts batches of 16.",
    "'data.tsv{text=\\[question,sentence] label=label tokenizer=FOLDER batch=16 max_length=128}', or a .csv file: "
    "texts for the tokenizer of transformers in FOLDER, and labels.",
    "script.py:function: what the function returns, such as a list or a DataLoader.",
))
"""For --help, where a bracket is escaped."""


class Tabs(csv.excel_tab):
    """Fields between tabs; quotes are part of the texts, and often come alone."""

    quoting = csv.QUOTE_NONE


TABLES: dict[str, type[csv.Dialect]] = {".csv": csv.excel, ".tsv": Tabs}
"""How tables are written, by the suffix of the file."""


def batches(source: str, *, shuffle: bool = False) -> Any:
    """What `Batches` takes: the source that was written on the command line.

    An .npz file holds one array per input, and labels beside; batch=N cuts it into batches of N, which else the model
    decides. Of a table, `Table` has the options. A function is called without arguments, and again for each round
    where it gives out its batches once. shuffle: put the rows of a file in another order, the same each time.
    Raises UsageError for anything else, and for what is not there.
    """
    if ".py:" in source:
        return _of_function(source)
    path, options = _parsed(source)
    if path.suffix == ".npz":
        stacked = arrays(path)
        _require_options(options, ["batch"], path)
        if shuffle:
            stacked = {name: array[_order(len(array))] if array.ndim else array for name, array in stacked.items()}
        return _cut(stacked, options["batch"], path) if "batch" in options else stacked
    if path.suffix in TABLES:
        _require_options(options, [field.name for field in fields(Table)], path)
        return Texts.of(path, Table(**options), shuffle)
    known = "an .npz, .csv or .tsv file, or script.py:function"
    if path.suffix == ".py":
        raise UsageError(f"{source}: say which function returns the batches, as in {source}:batches")
    if path.suffix in (".npy", ".pkl", ".pickle", ".pt", ".pth", ".bin"):
        raise UsageError(f"{path} has no names of inputs, or may hold a pickle, which is never loaded; give {known}")
    raise UsageError(f"{source!r} is no source of batches; give {known}")


def example(source: str, model: Any) -> dict[str, Tensor]:
    """Example inputs of a module or of a file: the first batch of a source, or all of an archive that is not cut."""
    from graphopt.pipeline.examples import first_batch

    found = batches(source)
    feeds: dict[str, Tensor] = first_batch(model, [found] if isinstance(found, dict) else found, name="inputs")
    return feeds


def function(source: str) -> Callable[..., Any]:
    """The function that `script.py:function` names, such as one from a model to how good it is.

    The file runs, with its folder where it may import from. Raises UsageError where there is no such file or function.
    """
    file, _, name = source.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not name:
        raise UsageError(f"{source!r} is no function; give script.py:function")
    require_file(path)
    scope = vars(_module(path.resolve()))
    if name not in scope:
        functions = [key for key, value in scope.items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"{path} has no function {name!r}{nearest(name, functions)}")
    found = scope[name]
    if not callable(found):
        raise UsageError(f"{name} in {path} is a {type(found).__name__}; name a function")
    return user_code(f"function {name} in {path}", found)


# --- archives ------------------------------------------------------------------------------------------------------


def arrays(path: Path) -> dict[str, Any]:
    """The arrays of an .npz file. Raises UsageError for another file, and for pickled objects, which can run code."""
    import numpy as np

    require_file(path)
    with (
        outer_door(UsageError, f"{path} is not an .npz file of plain arrays"),
        zipfile.ZipFile(path),  # which refuses what np.load reads besides: .npy, and pickles
        np.load(path, allow_pickle=False) as archive,
    ):
        return {name: archive[name] for name in archive.files}


def _cut(stacked: Mapping[str, Any], size: Any, path: Path) -> list[dict[str, Any]]:
    """Stacked arrays as batches of a size that the user chose."""
    require_positive_integer(f"{path}: batch", size)
    lengths = {name: len(array) for name, array in stacked.items() if array.ndim}
    if len(set(lengths.values())) != 1:
        raise UsageError(f"{path}: axis 0 must hold the same number of samples in every array, not {lengths}")
    starts = range(0, next(iter(lengths.values())), size)
    return [{name: stacked[name][start : start + size] for name in lengths} for start in starts]


def _order(number: int) -> Any:
    """An order of that many rows."""
    import numpy as np

    return np.random.default_rng(0).permutation(number)


# --- tables of texts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """How a .csv or .tsv file of texts is read: what may stand in the braces behind its name."""

    text: str | tuple[str, ...] = ()
    """The column of texts, or a list of two that the tokenizer makes pairs of."""
    tokenizer: str = ""
    """The folder of the model's tokenizer, as `save_pretrained` of transformers writes it."""
    label: str | None = None
    """The column of labels; left out, one called label, labels, target or targets, if there is one."""
    classes: tuple[str, ...] = ()
    """The names of classes in the order of their numbers, where the labels are names."""
    columns: tuple[str, ...] = ()
    """The names of the columns, of a file without a header line."""
    batch: int = 16
    """Rows in a batch."""
    max_length: int | None = None
    """Tokens at which texts are cut; left out, what the tokenizer says, if it does."""
    padding: str = "longest"
    """What texts are padded to: the longest of the batch, or max_length, for models of a fixed length."""


@dataclass(frozen=True)
class Texts:
    """The rows of a table in batches, tokenized when their turn comes: dicts of int64 (rows, tokens), and labels."""

    texts: tuple[list[str], ...]
    labels: Tensor | None
    tokenize: Callable[..., Mapping[str, Any]]
    batch: int

    @classmethod
    def of(cls, path: Path, table: Table, shuffle: bool) -> Texts:
        """The batches of a file. Raises UsageError, naming the line, the column or the option."""
        require_positive_integer(f"{path}: batch", table.batch)
        names, rows = read_table(path, _names(table.columns))
        columns = _names(table.text)
        if not 1 <= len(columns) <= 2:
            raise UsageError(f"{path}: say which columns hold the texts, text=NAME or text=[NAME,NAME]; there are "
                             f"{', '.join(names)}")  # fmt: skip
        label = _label_column(names) if table.label is None else str(table.label)
        for name in (*columns, *([] if label is None else [label])):
            if name not in names:
                header = "" if table.columns else " (columns=[...] names those of a file without a header line)"
                raise UsageError(f"{path} has no column {name!r}{nearest(name, names)}{header}")
        if shuffle:
            rows = [rows[place] for place in _order(len(rows))]
        texts = tuple([row[names.index(name)] for _, row in rows] for name in columns)
        labels = None
        if label is not None:
            cells = [(number, row[names.index(label)]) for number, row in rows]
            labels = _numbers(path, label, cells, _names(table.classes))
        return cls(texts, labels, _tokenizer(path, table), table.batch)

    def __len__(self) -> int:
        return -(-len(self.texts[0]) // self.batch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.texts[0]), self.batch):
            rows = slice(start, start + self.batch)
            labels = {} if self.labels is None else {"labels": self.labels[rows]}
            yield dict(self.tokenize(*(column[rows] for column in self.texts))) | labels


def _label_column(names: Sequence[str]) -> str | None:
    from graphopt.capture.labels import LABELS

    return next((name for name in LABELS if name in names), None)


def _names(value: Any) -> list[str]:
    """One name, or a list of them."""
    return [str(one) for one in (value if isinstance(value, tuple) else [value])]


def read_table(path: Path, columns: Sequence[str] = ()) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The names of the columns of a .csv or .tsv file, and the rows with the numbers of their lines.

    columns: the names, of a file without a header line. Raises UsageError for a file that is no such table.
    """
    require_file(path)
    if path.suffix not in TABLES:
        raise UsageError(f"{path} is no table: give a {' or '.join(TABLES)} file")
    is_table = outer_door(UsageError, f"{path} is no table of text in UTF-8")
    with is_table, path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, TABLES[path.suffix])
        try:
            rows = [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            raise UsageError(f"{path}, line {reader.line_num}: {error}; is a quotation mark never closed?") from error
    names = list(columns) or (rows.pop(0)[1] if rows else [])
    if not rows:
        raise UsageError(f"{path} has no rows{'' if columns else ' below its header line'}")
    for number, row in rows:
        if len(row) != len(names):
            raise UsageError(f"{path}, line {number}: {len(row)} columns, and there are {len(names)} names: "
                             f"{', '.join(names)}")  # fmt: skip
    return names, rows


def _numbers(path: Path, column: str, cells: Sequence[tuple[int, str]], classes: Sequence[str]) -> Tensor:
    """A column of labels: int64 where all are whole numbers or classes, else float32."""
    import torch

    if classes:
        for number, cell in cells:
            if cell not in classes:
                raise UsageError(f"{path}, line {number}: {column} is {cell!r}{nearest(cell, classes)}")
        return torch.tensor([classes.index(cell) for _, cell in cells])
    for kind in (int, float):
        with suppress(ValueError, RuntimeError):  # RuntimeError: a number that int64 does not hold
            found = torch.tensor([kind(cell) for _, cell in cells])
            if bool(torch.isfinite(found).all()):
                return found
    number, cell = next((one for one in cells if not _is_number(one[1])), cells[0])
    raise UsageError(
        f"{path}, line {number}: {column} is {cell!r}; give numbers, or the names of classes as classes=[first,second]"
    )


def _is_number(cell: str) -> bool:
    with suppress(ValueError):
        return math.isfinite(float(cell))
    return False


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer of transformers in a folder. Raises UsageError where there is none."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError("texts need transformers: pip install 'graphopt[demo]'") from error
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} with a tokenizer")
    what = f"{folder} holds no tokenizer that transformers loads"
    with outer_door(UsageError, what):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made of the model's config alone
        raise UsageError(f"{what}: it has no vocabulary; save one there with save_pretrained")
    return tokenizer


def _tokenizer(path: Path, table: Table) -> Callable[..., Mapping[str, Any]]:
    """Lists of texts -> tensors by name. Raises UsageError where the folder holds no tokenizer."""
    if not table.tokenizer:
        raise UsageError(f"{path}: name the folder of the model's tokenizer, tokenizer=FOLDER")
    folder = Path(str(table.tokenizer))
    if not folder.is_dir():
        raise UsageError(f"{path}: there is no folder {folder} with a tokenizer")
    if table.max_length is not None:
        require_positive_integer(f"{path}: max_length", table.max_length)
    if table.padding not in ("longest", "max_length"):
        raise UsageError(f"{path}: padding is {table.padding!r}; give longest or max_length")
    tokenizer = tokenizer_in(folder)
    if tokenizer.pad_token is None:  # of decoders, whose mask says what is padding
        tokenizer.pad_token = tokenizer.eos_token
    own = tokenizer.model_max_length
    length = table.max_length or (own if own < 2**31 else None)  # it is 10**30 where nothing is known
    if table.padding == "max_length" and length is None:
        raise UsageError(f"{path}: say how long texts are padded to be, max_length=NUMBER")

    def tokenize(*columns: list[str]) -> Mapping[str, Any]:
        tokens: Mapping[str, Any] = tokenizer(
            *columns, padding=table.padding, truncation=length is not None, max_length=length, return_tensors="pt"
        )
        return tokens

    return tokenize


# --- functions -----------------------------------------------------------------------------------------------------


class _Again:
    """What a function gives out once, from a new call each round."""

    def __init__(self, call: Callable[[], Any], first: Any) -> None:
        self._call, self._next = call, first

    def __iter__(self) -> Iterator[Any]:
        batches, self._next = self._next, None
        return iter(self._call() if batches is None else batches)


def _of_function(source: str) -> Any:
    call = function(source)
    found = call()
    if found is None:
        raise UsageError(f"{source} returned None; it must return batches, such as a list or a DataLoader")
    return _Again(call, found) if isinstance(found, Iterator) else found


@cache
def _module(path: Path) -> Any:
    """The module in a file, under a name that hides no other; it runs once for all options that name it."""
    name = f"graphopt_script_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # as the file ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and the workers of a DataLoader look for it
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    with outer_door(UsageError, f"{path} cannot be loaded"):
        try:
            spec.loader.exec_module(module)
        except SystemExit as error:
            raise UsageError(f"{path} exits when it is loaded; guard what it runs by __name__ == '__main__'") from error
    return module


# --- the text of a source ------------------------------------------------------------------------------------------


def _parsed(source: str) -> tuple[Path, dict[str, Any]]:
    """The file, and the options in braces behind it."""
    from graphopt.pipeline.text import parse_options

    if not source.endswith("}"):
        return Path(source), {}
    file, brace, rest = source.partition("{")
    return Path(file), parse_options(brace + rest, source)


def _require_options(options: Mapping[str, Any], known: Sequence[str], path: Path) -> None:
    for name in options:
        if name not in known:
            raise UsageError(f"{path} has no option {name!r}{nearest(name, known)}")
