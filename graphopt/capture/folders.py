"""What holds a module -> the module: a folder that `save_pretrained` of transformers wrote, or a wrapper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from graphopt.errors import CaptureError, described, outer_door

_CONFIG = "config.json"


def opened(model: Any) -> Any:
    """The module in a Hugging Face folder, in eval mode, where `model` is a path to one; the module inside of a
    DataParallel or a DistributedDataParallel; anything else as it is.

    The folder holds config.json and weights in safetensors, in one file or in several with an index. The architecture
    is the first of the config's, as transformers has it: no code of the folder's is run, and no pickle is loaded.
    Raises CaptureError where that is not so, and where transformers is not installed.
    """
    if isinstance(model, nn.DataParallel | DistributedDataParallel):
        return model.module
    if not isinstance(model, str | Path) or not Path(model).is_dir():
        return model
    folder = Path(model)
    with outer_door(CaptureError, f"{folder} cannot be loaded"):
        architecture = _architecture(folder)
        _require_safetensors(folder)
        return _loaded(folder, architecture)


def origin_of(model: Any) -> Path | None:
    """The folder of transformers that a model is or came from: a path to one, or a module that was loaded from one."""
    named = model if isinstance(model, str | Path) else getattr(model, "name_or_path", None)
    if isinstance(named, str | Path) and str(named) and (Path(named) / _CONFIG).is_file():
        return Path(named).absolute()
    return None


def _architecture(folder: Path) -> str:
    file = folder / _CONFIG
    if not file.is_file():
        raise CaptureError(f"{folder} is a folder without {_CONFIG}: give one that save_pretrained wrote, or a file")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CaptureError(f"{file} is no JSON: {described(error)}") from error
    named = config.get("architectures") if isinstance(config, dict) else None
    if not (isinstance(named, list) and named and isinstance(named[0], str)):
        raise CaptureError(f"{file} names no architecture: load the module with its class, and hand that over")
    return named[0]


def _require_safetensors(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    held = f" holds {pickles[0]}, which may be a pickle and is never loaded, and" if pickles else ""
    raise CaptureError(f"{folder}{held} has no weights in safetensors: save the model with save_pretrained")


def _loaded(folder: Path, architecture: str) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise CaptureError(f"{folder} is a model of transformers: pip install transformers") from error
    kind = getattr(transformers, architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CaptureError(
            f"{folder} is a {architecture}, which transformers {transformers.__version__} does not have, and code in a "
            "folder is never run: load the module yourself, and hand that over"
        )
    with _no_bars(transformers.utils.logging):
        model: nn.Module = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    return model.eval()


@contextmanager
def _no_bars(logging: Any) -> Iterator[None]:
    """Without the bars of transformers, which come and go within a second, also where a command is to be quiet."""
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
