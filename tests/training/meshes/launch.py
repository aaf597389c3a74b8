"""Several processes on this machine, as torchrun starts them."""

from __future__ import annotations

import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.multiprocessing as mp

WAIT = 1800.0
"""Seconds until a launch is given up."""


def launch(count: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """What a function of a module returns on each of `count` ranks; an exception comes back as its text, and a process
    that ends without an answer as its exit code.

    What is returned must be plain data: it goes through a queue.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    answers = context.Queue()
    call = partial(function, *arguments, **options)
    started = [
        context.Process(target=_run, args=(answers, rank, count, port, call), daemon=True) for rank in range(count)
    ]
    for process in started:
        process.start()
    found: dict[int, Any] = {}
    end = time.monotonic() + WAIT
    try:
        while len(found) < count:
            assert time.monotonic() < end, f"ranks {set(range(count)) - found.keys()} gave no answer"
            try:
                rank, answer = answers.get(timeout=0.5)
                found[rank] = answer
            except queue.Empty:
                found |= {rank: one.exitcode for rank, one in enumerate(started)
                          if one.exitcode not in (None, 0) and rank not in found}  # fmt: skip
    finally:
        for process in started:
            process.join(10)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(count)]


def _run(answers: Any, rank: int, count: int, port: int, function: Callable[[], Any]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GRAPHOPT_MEASURE": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        answer = function()
    except Exception:
        answer = traceback.format_exc()
    answers.put((rank, answer))
