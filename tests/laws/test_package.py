"""The wheel and the source distribution install, hold the checkout's files once each, and run from anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("graphopt", "passes", "backends", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command; its whole output in the failure when it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both distributions, built from a copy so that no build folder appears in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SHIPPED:
        origin = ROOT / name
        if origin.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
            shutil.copytree(origin, source / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(origin, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", out, source, cwd=out)
    [wheel], [sdist] = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(wheel, sdist)


def environment(folder: Path) -> Path:
    """A new environment that sees the packages of this interpreter after its own; its Python.

    Their folders are only put on the path, and .pth files in them aren't read: an editable install of graphopt there
    stays out of sight.
    """
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(own) / "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    return python


def install(python: Path, distribution: Path) -> None:
    # --ignore-installed: pip would take this interpreter's own graphopt for an older version of the same.
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, distribution, cwd=python.parent)


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installs_and_runs_from_another_folder(kind: str, built: Built, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    install(python, getattr(built, kind))
    where = "import graphopt, graphopt.passes, graphopt.backends as b; print(graphopt.__file__, b.__file__, sep='\\n')"
    for file in run(python, "-c", where, cwd=tmp_path).split():
        assert Path(file).is_relative_to(tmp_path / "venv")
    assert "optimize" in run(python.parent / "graphopt", "--help", cwd=tmp_path)


def test_wheel_holds_the_files_of_the_checkout_once(built: Built) -> None:
    names = [name for name in zipfile.ZipFile(built.wheel).namelist() if ".dist-info/" not in name]
    folders = [ROOT / "graphopt", ROOT / "graphopt" / "passes", ROOT / "graphopt" / "backends"]
    kinds = ("*.py", "*.jinja", "py.typed")
    found = {file.relative_to(ROOT).as_posix() for folder in folders for kind in kinds for file in folder.rglob(kind)}
    assert sorted(names) == sorted(found)
