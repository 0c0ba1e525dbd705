"""What all tests share: the option `--long` and the markers `long` and `root`.

`--long` runs the exhaustive versions. A test that is one of them bears the marker `long`; a test that only widens its
sample asks `request.config.getoption("--long")`. The marker `root` is for what needs the machine's own root: root of a
user namespace of its own, which is enough for nearly all of the suite, is not that.
"""

import signal
from pathlib import Path

import hypothesis
import pytest

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("vmnet", deadline=None)
hypothesis.settings.load_profile("vmnet")
# A shell ignores SIGINT and SIGQUIT in what it puts into the background, nohup SIGHUP; what is tested inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGQUIT, signal.SIGHUP):
    signal.signal(_number, signal.SIG_DFL)

WHOLE_MAP = ["0", "0", "4294967295"]


def is_real_root() -> bool:
    """Tell whether uid 0 here is uid 0 of the machine: its user namespace maps every uid to itself."""
    own = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    uid = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Uid:"))
    return own == [WHOLE_MAP] and uid.split()[2] == "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the exhaustive versions of the tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    if not (Path("/proc/self/uid_map").exists() and is_real_root()):
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(
                    pytest.mark.skip(reason="needs the machine's own root: this is not uid 0 of all its uids")
                )
