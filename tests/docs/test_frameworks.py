"""The examples for web frameworks in the guide run as they stand there."""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import classifier  # noqa: F401  (the bundle that answers)

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "serving.md"
pytestmark = pytest.mark.slow


def example(framework: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the guide's example for a framework is; five lines."""
    pytest.importorskip(framework)
    blocks = re.findall(r"<!--- skip: next -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (source,) = [one for one in blocks if f"from {framework}" in one]
    assert len(source.splitlines()) == 5
    monkeypatch.chdir(bundle.parent)
    (bundle.parent / "bundle").unlink(missing_ok=True)
    (bundle.parent / "bundle").symlink_to(bundle)
    module = types.ModuleType(f"{framework}_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, module.__dict__)
    return module


def is_a_table(found: Any) -> bool:
    return {row["label"] for row in found} == {"bad", "good", "other"}


def test_flask(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    module = example("flask", classifier, monkeypatch)
    assert is_a_table(module.app.test_client().post("/answer", data="w2 w3").get_json())


def test_django(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    module = example("django", classifier, monkeypatch)
    settings = importlib.import_module("django.conf").settings
    settings.configure(ROOT_URLCONF=module.__name__, ALLOWED_HOSTS=["*"])
    client = importlib.import_module("django.test").Client()
    assert is_a_table(client.post("/answer", b"w2 w3", content_type="text/plain").json()["answer"])


def test_fastapi(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    module = example("fastapi", classifier, monkeypatch)
    client = importlib.import_module("fastapi.testclient").TestClient(module.app)
    assert is_a_table(client.post("/answer", content="w2 w3", headers={"Content-Type": "text/plain"}).json())
