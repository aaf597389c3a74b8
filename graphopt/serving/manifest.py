"""What a bundle says of itself: manifest.json, which is read strictly and never trusted.

Its first keys are those of the json that `Optimized.export` writes beside a model (`Report.to_dict`); the fields of
`Manifest` stand beside them.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from graphopt.errors import BundleError

T = TypeVar("T")

FILE = "manifest.json"
SCHEMA = 1
LARGEST = 64 << 20
"""Most bytes of a manifest: the report of a model with many thousands of sites has a few MB."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of models, and the parts of the names of files: no separators, nothing that begins with a dot."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or an output of the model."""

    name: str
    dtype: str
    """As numpy spells it, such as float32."""
    shape: tuple[int | str | None, ...]
    """A size, the name of a dynamic axis, or None for an axis without a name."""
    below: int | None = None
    """Of inputs that are indices (tokens): how many rows they choose from. Integers from 0 up to it are taken: not all
    kernels look for themselves, and then read what lies behind the table."""


@dataclass(frozen=True)
class FileSpec:
    """A file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class EngineSpec:
    """What runs the model."""

    name: str
    version: str
    """That the bundle was made with."""
    least: str
    """The oldest version that knows the operators of the model."""


@dataclass(frozen=True)
class CpuSpec:
    """What CPU the model was tuned for."""

    model: str
    flags: str
    """As Linux spells them, separated by spaces."""


@dataclass(frozen=True)
class Padding:
    """How a request may be made longer, so that it is of one length with others."""

    axis: str
    """The dynamic axis of the inputs that grows, by its name in their shapes."""
    values: Mapping[str, int]
    """By input that has the axis, what is appended."""
    invariant: bool
    """Whether the answer stays as good, measured on the golden inputs; only then are requests padded."""
    sqnr: float | None
    """Of answers to padded inputs against the golden outputs, in dB; None where that was not measured."""


@dataclass(frozen=True)
class BatchTiming:
    """One row of the batch table."""

    batch: int
    length: int | None
    """Of the axis that may be padded; None where there is none."""
    ms: float | None
    """Median latency on the CPU that the bundle was made on; None where nothing was measured."""


@dataclass(frozen=True)
class GoldenSpec:
    """The golden set: inputs, and outputs in floats."""

    file: str
    cases: int
    reference: str
    """What computed the outputs: "float" is the model before quantization, "itself" the model of the bundle."""
    sqnr: float
    """Of the bundle's answers when it was made against the golden outputs, over all cases, in dB."""
    case_sqnr: tuple[float, ...]


@dataclass(frozen=True)
class TextSpec:
    """How texts become inputs."""

    tokenizer: str
    """The file of a tokenizer of the library `tokenizers`."""
    max_length: int | None
    pad_id: int
    generates: bool = False
    """Whether the model is a causal language model, whose logits are of the next token."""
    eos_ids: tuple[int, ...] = ()
    """The tokens at which generation ends."""


@dataclass(frozen=True)
class ImageSpec:
    """How images become inputs, in this order."""

    input: str
    resize: tuple[int, ...] | None
    """(shortest edge,), or (height, width)."""
    crop: tuple[int, int] | None
    """(height, width) in the middle."""
    resample: int
    """As pillow numbers its filters: 2 is bilinear, 3 bicubic."""
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool = False


@dataclass(frozen=True)
class AnswerSpec:
    """What /predict makes of the outputs."""

    output: str
    labels: tuple[str, ...] = ()
    """The classes of the last axis, whose softmax are scores; empty: the output itself."""
    pooling: str | None = None
    """"mean" over the tokens, or "cls", the first one."""
    normalize: bool = False
    """To length 1."""


@dataclass(frozen=True)
class Manifest:
    """manifest.json without the report of what was optimized."""

    name: str
    model: str
    weights: tuple[str, ...]
    """Files that weights lie in, beside the model's own."""
    portable: str | None
    """A twin in standard operators, for engines that lag."""
    engine: EngineSpec
    opset: int
    cpu: CpuSpec
    threads: int | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch_invariant: bool | None
    """Whether the other rows of a batch leave an answer as it is, measured; None: the model takes no batches."""
    batch_sqnr: float | None
    """Of answers beside other rows against answers beside the first ones, in dB; the worst."""
    padding: Padding | None
    batches: tuple[BatchTiming, ...]
    golden: GoldenSpec
    accuracy: Mapping[str, float]
    files: Mapping[str, FileSpec]
    provenance: Mapping[str, str]
    text: TextSpec | None = None
    image: ImageSpec | None = None
    code: str | None = None
    """The name of an entry point in the group graphopt.serving, of code for texts, images or anything else."""
    answer: AnswerSpec | None = None
    max_length: int | None = None
    """Most tokens that the model takes, where it has a limit."""
    schema: int = SCHEMA
    report: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The other keys of the file: `Report.to_dict`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the file holds it."""
        own = asdict(self)
        report = own.pop("report")
        return {"schema": own.pop("schema"), "name": own.pop("name"), **report, **_plain(own)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def input(self, name: str) -> TensorSpec | None:
        return next((one for one in self.inputs if one.name == name), None)


def parsed(content: bytes, where: str) -> Manifest:
    """The manifest in a file. where: the bundle, for messages. Raises BundleError for anything that is not one."""
    if len(content) > LARGEST:
        raise BundleError(f"{where}: {FILE} has {len(content)} bytes, and none has more than {LARGEST}")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: {FILE} is no JSON") from error
    if not isinstance(found, dict) or "schema" not in found:
        raise BundleError(f"{where}: {FILE} is no manifest of a bundle: it has no schema")
    if found["schema"] != SCHEMA:
        raise BundleError(
            f"{where}: {FILE} is of schema {found['schema']!r}, and this graphopt reads {SCHEMA}: make the bundle again"
        )
    own = {one.name for one in fields(Manifest)} - {"report"}
    try:
        manifest: Manifest = _read(
            Manifest, {key: value for key, value in found.items() if key in own} | {"report": {}}, FILE
        )
    except _Wrong as error:
        raise BundleError(f"{where}: {error}") from None
    for name in (manifest.name, *(part for file in manifest.files for part in file.split("/"))):
        if not NAME.fullmatch(name):
            raise BundleError(f"{where}: {FILE} holds the name {name!r}; letters, digits, dots and hyphens make one")
    needed = [manifest.model, *manifest.weights, manifest.golden.file, *filter(None, [manifest.portable])]
    needed += [] if manifest.text is None else [manifest.text.tokenizer]
    for name in needed:
        if name not in manifest.files:
            raise BundleError(f"{where}: {FILE} has no hash of {name}")
    report = {key: value for key, value in found.items() if key not in own}
    object.__setattr__(manifest, "report", report)
    return manifest


def json_schema() -> dict[str, Any]:
    """The JSON Schema of manifest.json; the keys of the report are any."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "graphopt bundle",
        **_schema(Manifest, leave_out=("report",)),
    }


class _Wrong(Exception):
    """What is wrong in a manifest, and where."""


def _plain(value: Any) -> Any:
    """JSON has neither infinity nor NaN: they are text, as in the report."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as the type that a field declares. Raises _Wrong for another."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for one in arguments:
            if one is type(None):
                if value is None:
                    return None
            elif _may_be(one, value):
                return _read(one, value, where)
        raise _Wrong(f"{where} is {_shown(value)}")
    if not _may_be(kind, value):
        raise _Wrong(f"{where} is {_shown(value)}, and should be {_kind_name(kind)}")
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        found = {}
        for one in fields(kind):
            if one.name in value:
                found[one.name] = _read(hints[one.name], value[one.name], f"{where}: {one.name}")
            elif one.default is MISSING and one.default_factory is MISSING:
                raise _Wrong(f"{where} has no {one.name}")
        return kind(**found)
    if origin is tuple:
        items = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(items) != len(value):
            raise _Wrong(f"{where} has {len(value)} entries, and should have {len(items)}")
        pairs = enumerate(zip(items, value, strict=True))
        return tuple(_read(one, item, f"{where}[{index}]") for index, (one, item) in pairs)
    if origin is not None and issubclass(origin, Mapping):
        return {key: _read(arguments[1], item, f"{where}: {key}") for key, item in value.items()}
    return float(value) if kind is float else value


def _may_be(kind: Any, value: Any) -> bool:
    """Whether a value of JSON is of the outer type that a field declares."""
    if kind is Any:
        return True
    if kind is float:
        return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("inf", "-inf", "nan")
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (str, bool):
        return isinstance(value, kind)
    return isinstance(value, list if get_origin(kind) is tuple else dict)


_NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


def _kind_name(kind: Any) -> str:
    return _NAMES.get(kind) or ("a list" if get_origin(kind) is tuple else "an object")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _schema(kind: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(one) for one in arguments]}
    if is_dataclass(kind):
        hints, own = get_type_hints(kind), [one for one in fields(kind) if one.name not in leave_out]
        required = [one.name for one in own if one.default is MISSING and one.default_factory is MISSING]
        return {
            "type": "object",
            "properties": {one.name: _schema(hints[one.name]) for one in own},
            "required": required,
        }
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return {"type": "array", "items": _schema(arguments[0])}
        return {"type": "array", "prefixItems": [_schema(one) for one in arguments], "minItems": len(arguments)}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1])}
    if kind is float:
        return {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}
    return {} if kind is Any else {"type": {int: "integer", str: "string", bool: "boolean", type(None): "null"}[kind]}
