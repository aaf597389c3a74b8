"""The README keeps to its length, and the site has a page for every pass and target."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from graphopt.backends import TARGETS
from graphopt.passes import REGISTRY

ROOT = Path(__file__).parents[2]


def test_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(("section", "names"), [("passes", REGISTRY.built_in), ("targets", TARGETS.built_in)])
def test_the_first_page_of_a_section_links_to_every_other(section: str, names: Iterable[str]) -> None:
    index = (ROOT / "docs" / section / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([\w-]+)\.md\)", index)) == set(names)


def test_links_of_the_readme_lead_to_files() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)", readme)
    assert links and [link for link in links if not (ROOT / link).is_file()] == []
