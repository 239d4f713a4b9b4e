"""The wheel holds one package with everything in it, and works away from the checkout."""

import configparser
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("models", "pallas_kernels", "serving")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    # With the tools of this environment: a test may not need a network.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder with nothing but the installed wheel."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        # A pure wheel is installed by unpacking it; pip may be missing in a uv environment.
        assert "Root-Is-Purelib: true" in archive.read(_metadata(archive, "WHEEL")).decode()
        archive.extractall(target)
    return target


def _metadata(archive: zipfile.ZipFile, name: str) -> str:
    (path,) = [n for n in archive.namelist() if n.endswith(f".dist-info/{name}")]
    return path


def test_wheel_has_exactly_one_top_level_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"jpaged"}


def test_wheel_is_pure_and_typed(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "jpaged/py.typed" in archive.namelist()
        metadata = archive.read(_metadata(archive, "METADATA")).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata


@pytest.mark.parametrize("folder", FOLDERS)
def test_wheel_holds_the_linked_folder_as_real_files(wheel, folder):
    expected = {
        f"jpaged/{folder}/{path.relative_to(ROOT / folder).as_posix()}"
        for pattern in ("*.py", "static/*")
        for path in (ROOT / folder).rglob(pattern)
    }
    with zipfile.ZipFile(wheel) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    assert expected <= entries.keys()
    symlink = 0o120000
    assert all(entries[name].external_attr >> 16 & 0o170000 != symlink for name in expected)


def test_wheel_names_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(_metadata(archive, "entry_points.txt")).decode())
    assert entry_points["console_scripts"]["jpaged"] == "jpaged.cli:main"


def test_sdist_holds_every_folder_and_the_license(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "tests/test_packaging.py"} <= names
    assert not [name for name in names if name.startswith(".") and name != ".gitignore"]
    # The linked folders come as real ones, once.
    assert {f"jpaged/{folder}/__init__.py" for folder in FOLDERS} <= names


def test_wheel_works_away_from_the_checkout(installed, tmp_path):
    code = """\
import jpaged, jpaged.models, jpaged.pallas_kernels, jpaged.serving
import jpaged.llm
print(*{m.__file__.rsplit("/jpaged/", 1)[0] for m in (
    jpaged, jpaged.llm, jpaged.models, jpaged.pallas_kernels, jpaged.serving)})
"""
    # A folder called as one of ours must not be taken for it.
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise ImportError('the wrong models')")
    out = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert out.split() == [str(installed)]


def test_command_of_the_wheel_runs(installed, tmp_path):
    environment = {"PYTHONPATH": str(installed)}
    out = run(sys.executable, "-m", "jpaged", "--version", cwd=tmp_path, **environment)
    assert out.startswith("jpaged 0.")
