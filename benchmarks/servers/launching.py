"""Start a server that answers from a bundle, and stop it; one process tree each, on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from graphopt.serving.bundles import opened
from graphopt.serving.repositories import repository

APPS = Path(__file__).parent / "apps"
"""What runs in the environments of the servers, which lack graphopt."""
START_SECONDS = 180.0
NAME = "minilm"


class PeerFailed(Exception):
    """A server did not start."""


@dataclass(frozen=True)
class Place:
    """Where a server runs, and what from."""

    venv: Path
    """The virtual environment of the server."""
    bundle: Path
    threads: int
    port: int
    folder: Path
    """Empty, for files of the server's."""

    @property
    def python(self) -> str:
        return str(self.venv / "bin" / "python")

    @property
    def model(self) -> str:
        return str(self.bundle / opened(self.bundle).manifest.model)

    @property
    def packages(self) -> Path:
        return next((self.venv / "lib").glob("python*/site-packages"))


@dataclass(frozen=True)
class Server:
    """A server that is compared."""

    name: str
    packages: str
    """What its virtual environment holds, as pip takes it."""
    command: Callable[[Place], tuple[Sequence[str], Mapping[str, str]]]
    """Its command, and variables of its environment."""
    ready: str = f"/v2/models/{NAME}/ready"
    binary: bool = True
    """Whether it takes tensors as bytes behind the JSON."""

    @property
    def variable(self) -> str:
        """The variable of the environment that names its virtual environment."""
        return f"GRAPHOPT_PEER_{self.name.split()[0].upper()}"

    @property
    def venv(self) -> Path | None:
        """Its virtual environment; None where there is none."""
        if self.name == "graphopt":
            return Path(sys.prefix)
        given = os.environ.get(self.variable)
        return None if given is None else Path(given)


def _graphopt(place: Place) -> tuple[Sequence[str], Mapping[str, str]]:
    served = place.folder / NAME / "1"
    shutil.copytree(place.bundle, served)
    command = ["-m", "graphopt", "serve", str(place.folder), "--port", str(place.port), "--quiet"]
    return [sys.executable, *command], {}


def _triton(place: Place) -> tuple[Sequence[str], Mapping[str, str]]:
    """Its repository is what `graphopt bundle --for triton` writes; only the backend's name leads to the shim."""
    shipped = place.packages / "pytriton" / "tritonserver"
    backends, version = place.folder / "backends", place.packages.parent.name.removeprefix("python")
    shutil.copytree(shipped / "backends" / "python", backends / "python")
    stub = shipped / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    (backends / "onnxruntime").mkdir()
    shutil.copy(APPS / "triton_model.py", backends / "onnxruntime" / "model.py")
    models = repository(place.bundle, place.folder / "models", "triton")
    for one in models.iterdir():
        if one.name != NAME:  # the ensemble that takes texts needs a tokenizer in that environment
            shutil.rmtree(one) if one.is_dir() else one.unlink()
    command = [
        str(shipped / "bin" / "tritonserver"), f"--model-repository={models}", f"--backend-directory={backends}",
        f"--http-port={place.port}", "--http-address=127.0.0.1", "--allow-grpc=false", "--allow-metrics=false",
    ]  # fmt: skip
    return command, {
        "LD_LIBRARY_PATH": str(place.packages / "nvidia_pytriton.libs"),
        "PATH": f"{place.venv / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(place.packages),
    }


def _mlserver(place: Place) -> tuple[Sequence[str], Mapping[str, str]]:
    shutil.copy(APPS / "mlserver_model.py", place.folder)
    parameters = {"uri": place.model, "extra": {"threads": place.threads}}
    model = {"name": NAME, "implementation": "mlserver_model.Onnx", "parameters": parameters}
    (place.folder / "model-settings.json").write_text(json.dumps(model), encoding="utf-8")
    settings = {
        "host": "127.0.0.1", "http_port": place.port, "grpc_port": free_port(), "metrics_port": free_port(),
        "parallel_workers": 0,
    }  # fmt: skip
    (place.folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return [str(place.venv / "bin" / "mlserver"), "start", str(place.folder)], {}


def _script(name: str) -> Callable[[Place], tuple[Sequence[str], Mapping[str, str]]]:
    def command(place: Place) -> tuple[Sequence[str], Mapping[str, str]]:
        return [place.python, str(APPS / name), place.model, NAME, str(place.threads), str(place.port)], {}

    return command


GRAPHOPT = Server("graphopt", "graphopt[serve]", _graphopt)
PEERS = (
    Server("Triton", "nvidia-pytriton==0.7.0 'numpy<2' onnxruntime", _triton),
    Server("MLServer", "mlserver onnxruntime", _mlserver, binary=False),
    Server("KServe", "kserve onnxruntime", _script("kserve_app.py")),
    Server("Ray Serve", "'ray[serve]' onnxruntime", _script("ray_app.py"), ready=f"/v2/models/{NAME}"),
)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def started(server: Server, venv: Path, bundle: Path, threads: int, folder: Path) -> Iterator[tuple[int, str]]:
    """The process and the URL of a server, once it is ready. Raises PeerFailed with the last line that it wrote."""
    port = free_port()
    folder.mkdir()
    command, variables = server.command(Place(venv, bundle, threads, port, folder))
    log = folder / "log.txt"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=folder, env=os.environ | variables, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url + server.ready, log)
        yield process.pid, url
    finally:
        processes = tree(process.pid)
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for one in processes:  # those that left its group
            try:
                os.kill(one, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    lines = [one for one in log.read_text(encoding="utf-8", errors="replace").splitlines() if one.strip()]
    raise PeerFailed((lines or ["it wrote nothing"])[-1][:90])


def tree(root: int) -> list[int]:
    """A process, and all that it started."""
    children: dict[int, list[int]] = {}
    for one in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((one / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(one.name))
    found, rest = list[int](), [root]
    while rest:
        found.append(rest.pop())
        rest += children.get(found[-1], [])
    return found


def cpu_seconds(root: int) -> float:
    """CPU time that a process, and all that it started, took so far."""
    total = 0.0
    for one in tree(root):
        try:
            fields = Path(f"/proc/{one}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
