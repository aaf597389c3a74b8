"""A client of the application in this process: what a server does between a socket and ASGI, without either."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from graphopt.serving.app import App, Settings


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The one line that a refusal has."""
        found = self.json()
        assert set(found) == {"error"}
        assert isinstance(found["error"], str) and found["error"] and "\n" not in found["error"]
        return str(found["error"])


@dataclass
class Client:
    """Calls an application whose models are loaded."""

    app: App
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    @classmethod
    def of(cls, folder: Path, **settings: Any) -> Self:
        found = cls(App(Settings(folder, **settings)))
        found.app.start()
        found.loop.run_until_complete(found.app.load())
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.app.stop()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def __call__(self, method: str, path: str, body: Any = b"", headers: Mapping[str, str] | None = None) -> Answer:
        """body: bytes, or what becomes JSON."""
        return self.loop.run_until_complete(self.call(method, path, body, headers))

    def together(self, *calls: tuple[Any, ...]) -> list[Answer]:
        """The answers to calls that are made at once."""

        async def all_of() -> list[Answer]:
            return list(await asyncio.gather(*(self.call(*one) for one in calls)))

        return self.loop.run_until_complete(all_of())

    async def call(
        self,
        method: str,
        path: str,
        body: Any = b"",
        headers: Mapping[str, str] | None = None,
        slow: float = 0.0,
        leaves: bool = False,
    ) -> Answer:
        """slow: seconds before the body comes. leaves: the client closes the connection behind its request."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
        }
        events: list[dict[str, Any]] = []
        has_read: list[bool] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(slow)
            if leaves and has_read:
                return {"type": "http.disconnect"}
            has_read.append(True)
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(event: dict[str, Any]) -> None:
            events.append(event)

        await self.app(scope, receive, send)
        start, *parts = events
        assert start["type"] == "http.response.start"
        found = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], found, b"".join(part.get("body", b"") for part in parts))
