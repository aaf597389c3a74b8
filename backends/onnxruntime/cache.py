"""Runs a decode step token after token on ONNX Runtime, its cache in buffers that stay where they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from graphopt.backends.onnxruntime.cached_attention import IN_PLACE
from graphopt.capture.decode import IDS, MASK, PAST, POSITIONS, PRESENT
from graphopt.errors import UsageError


class Decoder:
    """A session of a decode step, and the cache of what it has read.

    The step has the inputs input_ids and past_key_values.N.key and .value, and may have attention_mask and
    position_ids; its outputs are logits and present.N.key and .value. Where the file says that it takes a cache of
    fixed size, the kernels write new entries into the buffers, and nothing is copied. Other files return a longer cache
    at each step, which is handed back without a copy to numpy.
    """

    def __init__(self, session: ort.InferenceSession, capacity: int, batch: int = 1) -> None:
        """capacity: most positions that the cache holds, more than 0. batch: rows that are decoded together.

        Raises UsageError where the session is no such step.
        """
        self.session, self.capacity, self.batch = session, capacity, batch
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = [value.name for value in session.get_outputs()]
        pasts = [name for name in inputs if name.startswith(f"{PAST}.")]
        unknown = [name for name in inputs if name not in (IDS, MASK, POSITIONS, *pasts)]
        if not pasts or IDS not in inputs or "logits" not in outputs or unknown:
            raise UsageError(
                f"the file is no decode step: it has the inputs {', '.join(inputs)} and the outputs "
                f"{', '.join(outputs)}; capture the model with cache=True"
            )
        self.in_place = session.get_modelmeta().custom_metadata_map.get(IN_PLACE) == "true"
        self._inputs = inputs
        self._presents = {name: PRESENT + name.removeprefix(PAST) for name in pasts}
        self.reset()

    def reset(self) -> None:
        """Forget all that was read."""
        self.mask: NDArray[np.int64] = np.zeros((self.batch, 0), np.int64)
        """(batch, positions read), 1 at tokens."""
        room = self.capacity if self.in_place else 0
        self._cache = {name: self._buffer(name, room) for name in self._presents}

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions, such as those of a prompt that is continued once more.

        Raises UsageError where fewer were read.
        """
        if not 0 <= length <= self.length:
            raise UsageError(f"the cache holds {self.length} positions, of which {length} cannot be kept")
        if not self.in_place and length < self.length:
            kept = {name: np.ascontiguousarray(one.numpy()[:, :, :length]) for name, one in self._cache.items()}
            self._cache = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in kept.items()}
        self.mask = self.mask[:, :length]

    @property
    def length(self) -> int:
        """How many positions the cache holds."""
        return int(self.mask.shape[1])

    def step(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """The logits (batch, new, vocabulary) behind each of some new tokens, which are in the cache from then on.

        ids: (batch, new). mask: as ids, 0 at padding in front of a prompt; ones unless given. Raises UsageError where
        the cache has no room for them.
        """
        if ids.ndim != 2 or ids.shape[0] != self.batch or not ids.shape[1]:
            raise UsageError(f"ids have the shape {list(ids.shape)}; a step takes [{self.batch}, 1 or more]")
        if self.length + ids.shape[1] > self.capacity:
            raise UsageError(
                f"the cache holds {self.length} of {self.capacity} positions, and {ids.shape[1]} more do not fit: give "
                "a larger capacity, or reset()"
            )
        mask = np.ones_like(ids) if mask is None else mask
        # The kernel that works in place takes several new tokens behind a past of one row only.
        parts = ids.shape[1] if self.in_place and self.batch > 1 and self.length else 1
        pairs = zip(np.array_split(ids, parts, 1), np.array_split(mask, parts, 1), strict=True)
        return np.concatenate([self._run(*pair) for pair in pairs], 1)

    def _run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        self.mask = np.concatenate([self.mask, mask], 1)
        positions = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        binding = self.session.io_binding()
        for name, array in {IDS: ids, MASK: self.mask, POSITIONS: positions}.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(array.astype(_dtype(self._inputs[name]))))
        binding.bind_output("logits")
        for past, present in self._presents.items():
            binding.bind_ortvalue_input(past, self._cache[past])
            if self.in_place:
                binding.bind_ortvalue_output(present, self._cache[past])
            else:
                binding.bind_output(present)
        self.session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        if not self.in_place:
            self._cache = dict(zip(self._presents, presents, strict=True))
        found: NDArray[np.float32] = logits.numpy()
        return found

    def _buffer(self, name: str, room: int) -> ort.OrtValue:
        """An empty cache with room for some positions."""
        _, heads, _, size = self._inputs[name].shape
        return ort.OrtValue.ortvalue_from_numpy(np.zeros((self.batch, heads, room, size), _dtype(self._inputs[name])))


def _dtype(value: Any) -> type[np.generic]:
    """The numpy dtype of an input of a session."""
    kinds: dict[str, type[np.generic]] = {
        "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32
    }  # fmt: skip
    return kinds[value.type]
