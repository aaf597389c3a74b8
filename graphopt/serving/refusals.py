"""What a server refuses, with the status code of HTTP and one sentence."""

from __future__ import annotations

from graphopt.errors import GraphoptError


class Refused(GraphoptError):
    """A request that is not answered. status: of HTTP, 400 to 599. headers: to send with it."""

    def __init__(self, status: int, reason: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers
