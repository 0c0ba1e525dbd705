"""The fixtures of the tests on a Mac that is made of fakes; `mac.py` says how it is used."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.darwin.mac import Mac
from tests.kernel.warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Run vmnet's command line by a fork of one that has started already."""
    with Warm() as made:
        yield made


@pytest.fixture
def mac(tmp_path: Path, warm: Warm) -> Iterator[Mac]:
    """A stock Mac."""
    with Mac(tmp_path, warm) as made:
        yield made
