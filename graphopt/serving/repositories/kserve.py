"""An InferenceService of KServe that runs Triton on the repository that stands beside it."""

from __future__ import annotations

from pathlib import Path

from graphopt.serving.bundles import Bundle
from graphopt.serving.repositories import triton
from graphopt.serving.repositories.files import threads


def write(bundle: Bundle, folder: Path) -> None:
    """inference-service.yaml, and repository/, which is to be uploaded to where storageUri says."""
    (folder / "repository").mkdir()
    triton.write(bundle, folder / "repository")
    (folder / "inference-service.yaml").write_text(service(bundle), encoding="utf-8")


def service(bundle: Bundle) -> str:
    """The manifest of Kubernetes."""
    own, count = bundle.manifest, threads(bundle)
    name = own.name.lower().replace("_", "-").replace(".", "-").strip("-")[:50]
    memory = max(1, round(3 * sum(file.bytes for file in own.files.values()) / 2**30 + 0.5))
    return f"""apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: "{name}"
spec:
  predictor:
    model:
      modelFormat:
        name: triton
      protocolVersion: v2
      storageUri: "pvc://models/{own.name}"
      resources:
        requests: {{cpu: "{count}", memory: {memory}Gi}}
        limits: {{cpu: "{count}", memory: {memory}Gi}}
"""
