"""A repository of OpenVINO Model Server: config.json, and the model in standard operators."""

from __future__ import annotations

import json
from pathlib import Path

from graphopt.errors import UsageError
from graphopt.serving.bundles import Bundle
from graphopt.serving.engine import standards
from graphopt.serving.repositories.files import threads, write_model

ROOT = "/models"
"""Where the folder is mounted in the server's container."""


def write(bundle: Bundle, folder: Path) -> None:
    """NAME/1/ for the model, and config.json. Raises UsageError where the bundle has no model in standard operators."""
    own = bundle.manifest
    name = own.portable or own.model
    _, domains = standards(bundle.content[name], str(bundle.folder))
    if own_domains := sorted(domains - {"ai.onnx", "ai.onnx.ml"}):
        raise UsageError(
            f"{own.name} has operators of {', '.join(own_domains)} and no portable twin, and OpenVINO reads standard "
            "ones: bundle what optimize returned, which has a twin"
        )
    write_model(bundle, folder / own.name / "1", name)
    (folder / "config.json").write_text(json.dumps(config(bundle), indent=2) + "\n", encoding="utf-8")


def config(bundle: Bundle) -> dict[str, object]:
    """What the server reads with --config_path."""
    own, count = bundle.manifest, threads(bundle)
    model = {
        "name": own.name,
        "base_path": f"{ROOT}/{own.name}",
        "target_device": "CPU",
        "nireq": 1,
        "plugin_config": {"INFERENCE_NUM_THREADS": count, "NUM_STREAMS": 1},
    }
    return {"model_config_list": [{"config": model}]}
