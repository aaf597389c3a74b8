"""The body of a request, read within limits: of time, of bytes, and of bytes after decompression."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from graphopt.serving.refusals import Refused

Receive = Callable[[], Awaitable[Any]]

_WINDOW = {b"gzip": zlib.MAX_WBITS | 16, b"x-gzip": zlib.MAX_WBITS | 16, b"deflate": zlib.MAX_WBITS}
CLOSE = ((b"connection", b"close"),)
"""Where the rest of a body was not read, what follows on the connection is no request."""


class Gone(Exception):
    """The client has closed the connection."""


async def read(headers: Mapping[bytes, bytes], receive: Receive, *, most: int, seconds: float) -> bytes:
    """The body, decompressed. most: bytes, as sent and after decompression. seconds: until it must have come.

    Raises Refused: 413 for more, 408 for one that takes longer, 415 for another compression than gzip and deflate, 400
    where it cannot be decompressed; and Gone.
    """
    length = headers.get(b"content-length")
    if length is not None and (not length.isdigit() or len(length) > 18 or int(length) > most):
        raise Refused(413, f"the body has {length.decode('ascii', 'replace')[:20]} bytes; the most is {most}", CLOSE)
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in _WINDOW and encoding not in (b"identity", b""):
        raise Refused(415, "the body may be compressed by gzip or deflate, and by nothing else", CLOSE)
    first = await _event(receive, seconds)
    if not first.get("more_body"):
        body = first.get("body", b"")
    else:
        parts, size, end = [first.get("body", b"")], len(first.get("body", b"")), _now() + seconds
        while True:
            if size > most:
                raise Refused(413, f"the body has more than {most} bytes", CLOSE)
            event = await _event(receive, end - _now())
            parts.append(event.get("body", b""))
            size += len(parts[-1])
            if not event.get("more_body"):
                break
        body = b"".join(parts)
    if len(body) > most:
        raise Refused(413, f"the body has more than {most} bytes", CLOSE)
    return _decompressed(body, _WINDOW[encoding], most) if encoding in _WINDOW else bytes(body)


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _event(receive: Receive, seconds: float) -> dict[str, Any]:
    """The next part of the body."""
    try:
        async with asyncio.timeout(max(seconds, 0.001)):
            event = await receive()
    except TimeoutError:
        raise Refused(408, "the body came too slowly", CLOSE) from None
    if event["type"] == "http.disconnect":
        raise Gone
    return dict(event)


def _decompressed(body: bytes, window: int, most: int) -> bytes:
    """At most so many bytes: a few KB can hold gigabytes."""
    try:
        decoder = zlib.decompressobj(window)
        found = decoder.decompress(body, most + 1)
        if len(found) > most or decoder.unconsumed_tail:
            raise Refused(413, f"the body has more than {most} bytes after decompression")
        found += decoder.flush()
    except zlib.error as error:
        raise Refused(400, "the body cannot be decompressed") from error
    if not decoder.eof:
        raise Refused(400, "the compressed body is cut off")
    return found
