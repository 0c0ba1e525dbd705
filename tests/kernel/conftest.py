"""The fixtures of the kernel tests: what `net.py` describes, fresh for each test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel import net
from tests.kernel.machine import Machine, wait_until
from tests.kernel.warm import Warm


@pytest.fixture(scope="session")
def _namespaces() -> str | None:
    return net.why_not()


@pytest.fixture
def lab(tmp_path: Path, _namespaces: str | None) -> Iterator[net.Lab]:
    """All of it; the other fixtures are its parts."""
    if _namespaces is not None:
        pytest.skip(_namespaces)
    with net.Lab(tmp_path) as made:
        yield made


# What is run both ways: each command by a process of its own, and by the server's.
BOTH_WAYS = {
    "test_alias", "test_apply", "test_carve", "test_cli", "test_exec", "test_many", "test_names",
    "test_next", "test_refusals", "test_restore", "test_run",
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in BOTH_WAYS and "laptop" in metafunc.fixturenames:
        metafunc.parametrize("laptop", ["direct", "served"], indirect=True)


@pytest.fixture
def laptop(lab: net.Lab, request: pytest.FixtureRequest) -> net.Laptop:
    if getattr(request, "param", "") == "served":
        lab.laptop.start_server()
    return lab.laptop


@pytest.fixture
def lan(lab: net.Lab) -> Machine:
    return lab.lan


@pytest.fixture
def internet(lab: net.Lab) -> Machine:
    return lab.internet


@pytest.fixture
def vmnet(laptop: net.Laptop) -> Callable[..., net.Result]:
    """Run vmnet's command line in the laptop."""
    return laptop.vmnet


@pytest.fixture
def tap(_namespaces: str | None) -> None:
    """Skip where no tap or tun can be opened."""
    reason = net.why_no_tap()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    """Run vmnet's command line by a fork of one that has started already."""
    with Warm() as made:
        yield made


@pytest.fixture
def settled(laptop: net.Laptop) -> None:
    """Wait for the laptop's own IPv6 address, which comes late on a busy machine: two looks would differ."""
    wait_until(lambda: laptop.run("ip", "-6", "addr", "show", "wlan0", "scope", "link", "-tentative") != "")
