"""A container that serves the bundle with graphopt: Dockerfile and compose.yaml."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from graphopt import __version__
from graphopt.serving.bundles import Bundle
from graphopt.serving.repositories.files import threads, write_bundle

PACKAGES = (
    "onnxruntime", "onnx", "numpy", "uvicorn", "httptools", "uvloop", "tokenizers", "pillow", "typer", "rich",
    "filelock", "platformdirs",
)  # fmt: skip
"""What a server needs of what graphopt needs: no torch."""


def write(bundle: Bundle, folder: Path) -> None:
    """models/NAME/1/ for the bundle, Dockerfile and compose.yaml."""
    own = bundle.manifest
    write_bundle(bundle, folder / "models" / own.name / "1")
    (folder / "Dockerfile").write_text(dockerfile(), encoding="utf-8")
    (folder / "compose.yaml").write_text(compose(own.name, threads(bundle)), encoding="utf-8")
    (folder / ".dockerignore").write_text("compose.yaml\n", encoding="utf-8")


def dockerfile() -> str:
    """An image that runs as a user without rights, and checks the bundle before it is ready."""
    pins = " ".join(_pinned(name) for name in PACKAGES)
    return f"""FROM python:3.11-slim
RUN pip install --no-cache-dir {pins} \\
 && pip install --no-cache-dir --no-deps graphopt=={__version__}
RUN useradd --create-home serve
USER serve
COPY models /models
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", \\
  "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=3)"]
STOPSIGNAL SIGTERM
CMD ["graphopt", "serve", "/models", "--host", "0.0.0.0"]
"""


def compose(name: str, cpus: int) -> str:
    """The token comes from the environment: without one the server refuses to listen beyond loopback."""
    return f"""services:
  {name.replace(".", "-")}:
    build: .
    ports: ["127.0.0.1:8000:8000"]
    environment:
      GRAPHOPT_TOKEN: ${{GRAPHOPT_TOKEN:?set a token}}
    read_only: true
    tmpfs: [/tmp]
    cap_drop: [ALL]
    cpus: {cpus}
    stop_grace_period: 40s
    restart: unless-stopped
"""


def _pinned(name: str) -> str:
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        return name
