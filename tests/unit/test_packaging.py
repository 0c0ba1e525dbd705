"""What travels: the locks name every package down to its bytes, and the wheel holds what the checkout holds."""

import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

CHECKOUT = Path(__file__).parents[2]
RUNTIME_LOCK = CHECKOUT / "requirements.lock"
TEST_LOCK = CHECKOUT / "requirements-test.lock"
PYPROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())


def read_lock(path: Path) -> dict[str, str]:
    """Return the version of each package in a lock; a line that is no pin with its hashes fails."""
    pins = {}
    text = re.sub(r"(?m)^ *#.*\n", "", path.read_text()).replace("\\\n", " ")
    for line in text.splitlines():
        requirement, *hashes = line.split("--hash=")
        pin = Requirement(requirement)
        assert hashes, line
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64} *", one) for one in hashes), line
        assert pin.marker is None or "sys_platform" in str(pin.marker), line
        version = re.fullmatch(r"==([^,*]+)", str(pin.specifier))
        assert version, line
        pins[pin.name] = version[1]
    return pins


@pytest.mark.parametrize(
    ("lock", "asked"),
    [
        (RUNTIME_LOCK, PYPROJECT["project"]["dependencies"]),
        (TEST_LOCK, PYPROJECT["project"]["dependencies"] + PYPROJECT["dependency-groups"]["test"]),
    ],
    ids=["runtime", "test"],
)
def test_the_locks_hold_what_the_project_asks_for(lock: Path, asked: list[str]) -> None:
    pins = read_lock(lock)
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_the_tests_run_with_the_packages_that_users_get() -> None:
    assert read_lock(RUNTIME_LOCK).items() <= read_lock(TEST_LOCK).items()


@pytest.mark.parametrize("lock", [RUNTIME_LOCK, TEST_LOCK], ids=lambda lock: lock.name)
def test_a_lock_names_no_place_to_fetch_from(lock: Path) -> None:
    assert "://" not in lock.read_text()
    assert "index" not in lock.read_text()


def build(source: Path, kind: str, where: Path) -> Path:
    """Build the wheel or the sdist of `source` with the packages of this very environment, and return its path."""
    argv = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(where)]
    subprocess.run(argv, cwd=source, check=True, capture_output=True)
    [built] = where.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CHECKOUT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CHECKOUT, "sdist", tmp_path_factory.mktemp("sdist"))


def templates() -> dict[str, bytes]:
    """Every template of the checkout: path below `templates/`, and content."""
    top = CHECKOUT / "templates"
    files = (path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    found = {str(path.relative_to(top)): path.read_bytes() for path in files}
    assert found
    return found


def test_the_wheel_holds_all_templates_types_and_the_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {
            name.removeprefix("vmnet/templates/"): archive.read(name)
            for name in archive.namelist()
            if name.startswith("vmnet/templates/")
        }
        assert held == templates()
        assert "vmnet/py.typed" in archive.namelist()
        [license_name] = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert archive.read(license_name) == (CHECKOUT / "LICENSE").read_bytes()


def test_a_wheel_made_from_the_sdist_is_the_same(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "-xzf", str(sdist), "-C", str(tmp_path)], check=True)
    [source] = tmp_path.iterdir()
    again = build(source, "wheel", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert {name: first.read(name) for name in first.namelist()} == {
            name: second.read(name) for name in second.namelist()
        }


PRINT_TEMPLATES = """
import importlib.resources, json, sys, vmnet
def walk(folder, prefix=""):
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from walk(entry, prefix + entry.name + "/")
        else:
            yield prefix + entry.name
print(vmnet.__file__)
print(*sorted(walk(importlib.resources.files("vmnet") / "templates")), sep="\\n")
"""


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel installed by pip; the packages it needs are lent from this one."""
    venv = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(venv / "bin/python"),
        "install",
        "-q",
        "--no-index",
        "--no-deps",
    ]
    subprocess.run([*pip, str(wheel)], check=True)
    [site_packages] = venv.glob("lib/python3*/site-packages")
    # Read as one more folder only: its own .pth files, which lead to the checkout, are not.
    (site_packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


def test_an_installed_wheel_finds_its_templates(installed: Path, tmp_path: Path) -> None:
    argv = [str(installed / "bin/python"), "-I", "-c", PRINT_TEMPLATES]
    done = subprocess.run(argv, cwd=tmp_path, check=True, capture_output=True, text=True)
    where, *found = done.stdout.splitlines()
    assert Path(where).is_relative_to(installed)
    assert found == sorted(templates())


def test_an_installed_wheel_has_the_command(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(installed / "bin/vmnet"), "--version"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    version = re.search(r'__version__ = "(.+)"', (CHECKOUT / "src/vmnet/__init__.py").read_text())
    assert version
    assert done.stdout == f"vmnet {version[1]}\n"
    lines = (installed / "bin/vmnet").read_text().splitlines()
    assert lines[0] == f"#!{installed / 'bin/python'}"
    assert [line for line in lines if "import" in line and not line.startswith("#")] == [
        "from vmnet.client import main"
    ]
