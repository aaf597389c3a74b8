"""An application of Ray Serve that answers from the bundle."""

from __future__ import annotations

from pathlib import Path

from graphopt.serving.bundles import Bundle
from graphopt.serving.repositories.files import threads, write_bundle


def write(bundle: Bundle, folder: Path) -> None:
    """app.py, and bundle/ beside it."""
    write_bundle(bundle, folder / "bundle")
    (folder / "app.py").write_text(app(bundle.manifest.name, threads(bundle)), encoding="utf-8")


def app(name: str, cpus: int) -> str:
    """Run by `serve run app:app`: POST / takes what /predict takes, or arrays by input."""
    return f'''"""{name} on Ray Serve. Written by graphopt; run it by: serve run app:app"""

from pathlib import Path

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from graphopt.errors import GraphoptError
from graphopt.serving import Predictor


@serve.deployment(name={name!r}, ray_actor_options={{"num_cpus": {cpus}}}, max_ongoing_requests=32)
class Served:
    def __init__(self) -> None:
        self.predictor = Predictor(Path(__file__).parent / "bundle", threads={cpus})

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            asked = await request.json()
            if isinstance(asked, dict) and "inputs" in asked and isinstance(asked["inputs"], dict):
                found = self.predictor(asked["inputs"])
                return JSONResponse({{name: array.tolist() for name, array in found.items()}})
            return JSONResponse({{"predictions": self.predictor.predict(asked)}})
        except (GraphoptError, ValueError) as error:
            return JSONResponse({{"error": str(error)}}, status_code=400)

    def check_health(self) -> None:
        self.predictor.run(self.predictor.cases[-1].inputs)


app = Served.bind()
'''
