"""Images -> inputs of a model, by transforms that the manifest holds as data."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import UsageError, described
from graphopt.serving.golden import Arrays
from graphopt.serving.manifest import ImageSpec, TensorSpec

MOST_PIXELS = 64_000_000
"""An image with more is refused before it is decoded or resized: a few KB of PNG can hold gigabytes, and so can a long
image of few pixels whose shortest edge grows."""


class Images:
    """Images as the model's input."""

    def __init__(self, spec: ImageSpec, inputs: Sequence[TensorSpec], *, where: str) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise UsageError(f"{where}: images need pillow: pip install 'graphopt[serve]'") from error
        self.spec = spec
        self._dtype = next((np.dtype(one.dtype) for one in inputs if one.name == spec.input), np.dtype("float32"))

    def __call__(self, images: Sequence[Any]) -> list[Arrays]:
        """Inputs for each image, a batch of one. Images: of pillow, paths, encoded bytes, or these in base64."""
        return [{self.spec.input: self._transformed(self._opened(one))} for one in images]

    def _opened(self, given: Any) -> Any:
        from PIL import Image

        if isinstance(given, Image.Image):
            return given.convert("RGB")
        if isinstance(given, dict):
            given = given.get("b64", given.get("image"))
        try:
            if isinstance(given, str):
                given = base64.b64decode(given.partition(",")[2] if given.startswith("data:") else given, validate=True)
            elif isinstance(given, Path):
                given = given.read_bytes()
            if not isinstance(given, bytes | bytearray):
                raise UsageError(f"an image is given as its bytes, in JSON as base64, and not as {str(given)[:60]!r}")
            with Image.open(io.BytesIO(given)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise UsageError(f"the image has {image.width} x {image.height} pixels; the most is {MOST_PIXELS}")
                return image.convert("RGB")
        except UsageError:
            raise
        except Exception as error:  # decoders of pillow raise many kinds
            raise UsageError(f"the image cannot be read: {described(error)}") from error

    def _transformed(self, image: Any) -> Any:
        spec = self.spec
        if spec.resize is not None:
            width, height = _size(spec.resize, image.size)
            if width * height > MOST_PIXELS:
                raise UsageError(f"the image is resized to {width} x {height} pixels; the most is {MOST_PIXELS}")
            image = image.resize((width, height), spec.resample)
        pixels = np.asarray(image, np.float32)
        if spec.crop is not None:
            pixels = _middle(pixels, spec.crop)
        mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
        pixels = (pixels * np.float32(spec.scale) - mean) / std
        ordered = pixels if spec.channels_last else pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(ordered[None], self._dtype)


def _size(resize: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) after resizing."""
    if len(resize) == 2:
        return resize[1], resize[0]
    width, height = size
    shortest = min(width, height)
    return max(1, width * resize[0] // shortest), max(1, height * resize[0] // shortest)


def _middle(pixels: Any, crop: tuple[int, int]) -> Any:
    """The middle of an image (height, width, 3), with black around one that is smaller."""
    missing = [max(0, crop[axis] - pixels.shape[axis]) for axis in (0, 1)]
    if any(missing):
        pixels = np.pad(pixels, [(one // 2, one - one // 2) for one in missing] + [(0, 0)])
    top, left = ((pixels.shape[axis] - crop[axis]) // 2 for axis in (0, 1))
    return pixels[top : top + crop[0], left : left + crop[1]]
