"""What the kinds of repositories have in common."""

from __future__ import annotations

from pathlib import Path

from graphopt.measure.machine import usable_cores
from graphopt.serving.bundles import Bundle


def write_model(bundle: Bundle, folder: Path, name: str) -> None:
    """Write a model of the bundle as model.onnx, with the files that its weights lie in. name: of a file of it."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(bundle.content[name])
    for file in bundle.manifest.weights:
        (folder / file).write_bytes(bundle.content[file])


def write_bundle(bundle: Bundle, folder: Path) -> None:
    """Write the bundle itself."""
    for name, content in bundle.content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "manifest.json").write_text(bundle.manifest.to_json(), encoding="utf-8")


def threads(bundle: Bundle) -> int:
    """Of the engine. Written out everywhere, since the default of most servers is all cores for each instance."""
    return bundle.manifest.threads or usable_cores()
