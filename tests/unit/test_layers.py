"""Imports point downward only: words, core, edges, engine, adapters."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "vmnet"
# What each part may import of vmnet; a part that is not named here fails.
ALLOWED: dict[str, set[str]] = {
    "": set(),
    "model": set(),
    "ipam": {"model"},
    "filters": {"model"},
    "flows": set(),
    "ops": {"filters"},
    "firewalls": {"ops"},
    "plan": {"filters", "firewalls", "ipam", "model", "ops"},
    "aliases": {"model", "ops", "plan"},
    "rules": {"plan"},
    "settings": {"ipam", "model", "plan"},
    "store": {"ipam", "model"},
    "absence": {"store"},
    "addressed": set(),
    "hostsfile": {"addressed", "model"},
    "found": {"model", "ops", "plan"},
    "locks": {"model"},
    "darwin": {"aliases", "darwin", "model", "ondisk", "ops", "plan", "platform"},
    "linux": {
        "aliases", "filters", "flows", "firewalls", "linux", "model", "ondisk", "ops", "plan", "platform", "hostsfile",
    },
    "platform": {"model", "ops", "plan"},
    "specs": {"model", "platform", "settings", "store"},
    "names": {"dnsmasq", "hostsfile", "locks", "model", "ops", "plan", "platform", "settings", "store"},
    "systemd": set(),
    "ondisk": set(),
    "dnsmasq": {
        "", "addressed", "dnsmasq", "locks", "model", "ondisk", "ops", "plan", "platform", "settings", "store",
        "systemd",
    },
    "guests": {"aliases", "model", "ops", "plan", "platform", "settings", "store"},
    "hostpart": {
        "found", "guests", "ipam", "locks", "model", "ops", "plan", "platform", "rules", "settings", "store",
    },
    "uncarved": {"locks", "model", "ops", "store"},
    "engine": {
        "absence", "found", "guests", "hostpart", "locks", "model", "names", "ondisk", "ops", "plan", "platform",
        "settings", "specs", "store", "uncarved",
    },
    "cloudinit": {"model", "plan", "settings"},
    "seed": {"model"},
    "signs": {"", "ondisk"},
    "truces": set(),
    "freshness": set(),
    "members": set(),
    "requests": {"model"},
    "watch": {"", "engine", "freshness", "model", "ops", "platform", "signs", "store", "truces"},
    "relay": {"model", "relay"},
    "hooks": {"", "client", "hooks", "members", "model", "ondisk", "settings", "systemd"},
    "doctor": set(),
    "questions": {"doctor"},
    "checkup": {
        "client", "dnsmasq", "doctor", "engine", "hooks", "members", "model", "ondisk", "ops", "plan", "platform",
        "questions", "settings", "signs", "systemd",
    },
    "server": {"", "client", "freshness", "members", "model", "server", "settings", "signs"},
    "cli": {
        "", "checkup", "cli", "client", "cloudinit", "darwin", "doctor", "engine", "hooks", "libvirt", "linux",
        "members", "model", "ops", "plan", "platform", "relay", "requests", "seed", "server", "settings", "signs",
        "specs", "store", "systemd", "watch",
    },
    "libvirt": {"engine", "libvirt", "linux", "model", "ops", "platform", "settings", "specs", "store"},
    "client": {"cli", "libvirt"},
    "__main__": {"client"},
}  # fmt: skip
PURE = {"absence", "aliases", "doctor", "flows", "model", "ipam", "filters", "ops", "firewalls", "plan", "requests"}
# What does I/O, or makes two calls with the same arguments differ.
IMPURE = {
    "os", "io", "pathlib", "socket", "subprocess", "time", "datetime", "random", "secrets", "sqlite3", "tempfile",
    "pyroute2", "typer", "rich", "logging", "ctypes", "fcntl",
}  # fmt: skip


def part_of(file: Path) -> str:
    """Return the part of vmnet that a source file belongs to."""
    first = file.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py").replace("__init__", "")


def imports(file: Path) -> set[str]:
    """Return the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "vmnet" else {module}
    return found


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_downward(file: Path) -> None:
    part = part_of(file)
    assert part in ALLOWED, f"{part} is in no layer: name it in {Path(__file__).name}"
    for module in imports(file):
        if module.split(".")[0] == "vmnet":
            target = [*module.split("."), ""][1]
            target = "" if target.startswith("__version__") else target
            assert target in ALLOWED[part], f"{file.name} of {part!r} imports {module}"


@pytest.mark.parametrize("file", [file for file in FILES if part_of(file) in PURE], ids=lambda file: file.stem)
def test_the_core_does_no_io(file: Path) -> None:
    assert not {module.split(".")[0] for module in imports(file)} & IMPURE
