"""A watcher at work in a laptop, as a person starts it, or one whose senses are not what they should be."""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.kernel.machine import wait_until
from tests.kernel.net import SOURCES, Laptop
from tests.kernel.warm import Warm

_CHECKOUT = Path(__file__).parents[2]
NEVER = 3600
"""An interval within which no test ends."""


class Watching:
    """`vmnet watch` in the laptop; a context manager that ends it, and sees that it ends well."""

    def __init__(
        self,
        laptop: Laptop,
        *options: str,
        interval: float = NEVER,
        sense: str | None = None,
        env: dict[str, str] | None = None,
        sources: Path = SOURCES,
    ) -> None:
        """`sense` is what is wrong with it (see `tests.kernel.senseless`), None for nothing."""
        self.laptop = laptop
        self._run = laptop.folder / "run" if "VMNET_RUN_DIR" in laptop.env else laptop.path("/run/vmnet")
        module = ("vmnet", "watch") if sense is None else ("tests.kernel.senseless", sense)
        arguments = [*module, "--interval", str(interval), *options]
        variables = {"PYTHONPATH": f"{sources}:{_CHECKOUT}", **(env or {})}
        self._killed = False
        self._log = laptop.folder / f"watch-{os.urandom(4).hex()}.log"
        words = [*(f"{key}={value}" for key, value in variables.items()), sys.executable, "-m", *arguments]
        self._process = laptop.start("sh", "-c", f'echo $$; exec env "$@" 2>{self._log}', "sh", *words)
        assert self._process.stdout
        # As the laptop counts, and as this machine does.
        self.pid = int(self._process.stdout.readline())
        self._outside = _outside(self.laptop, self.pid)

    def __enter__(self) -> Self:
        assert wait_until(self.is_ready, 30), self.log()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        code = self._process.wait()
        if kind is None and not self._killed:
            assert code == 0, self.log()

    def is_ready(self) -> bool:
        """Tell whether it has looked for the first time, or stands by."""
        status = self._run / "watch.json"
        looked = status.exists() and json.loads(status.read_text())["pid"] == self.pid
        return self._process.poll() is not None or looked or "standing by" in self.log()

    def log(self) -> str:
        """Return all that it has logged."""
        return self._log.read_text() if self._log.exists() else ""

    def changes(self) -> list[str]:
        """Return the lines that tell of a change."""
        return [line for line in self.log().splitlines() if line.startswith("vmnet: changed ")]

    def metrics(self) -> dict[str, float]:
        """Return what the metrics say, labels included in the names."""
        try:
            text = (self._run / "vmnet.prom").read_text()
        except FileNotFoundError:
            return {}
        pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name.removeprefix("vmnet_watch_"): float(value) for name, _, value in pairs}

    def counts(self) -> Counter[str]:
        """Return the metrics, causes added up."""
        found: Counter[str] = Counter()
        for name, value in self.metrics().items():
            found[name.partition("{")[0]] += int(value)
        return found

    def looks(self) -> int:
        """Return how often it has looked."""
        return self.counts()["looks_total"]

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._outside, number)
        if number == signal.SIGCONT:
            self._process.send_signal(number)  # nsenter stops itself when its child is stopped

    def kill(self) -> None:
        """Have it end without a chance to tidy up."""
        self._killed = True
        self.signal(signal.SIGKILL)
        self._process.wait()

    def memory(self) -> int:
        """Return how much of it is in memory now, in bytes."""
        lines = Path(f"/proc/{self._outside}/status").read_text().splitlines()
        [size] = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
        return int(size) * 1024

    def wait_for(self, text: str, patience: float = 20) -> None:
        """Wait until its log has this."""
        assert wait_until(lambda: text in self.log(), patience), f"no {text!r} in:\n{self.log()}"


def _outside(laptop: Laptop, pid: int) -> int:
    """Return the number by which this machine knows a process of the laptop's."""
    for line in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(row.split(":\t", 1) for row in line.read_text().splitlines() if ":\t" in row)
            same = os.stat(line.parent / "ns/pid").st_ino == os.stat(laptop.proc / "ns/pid_for_children").st_ino
        except OSError:
            continue
        if same and fields.get("NSpid", "").split()[-1:] == [str(pid)]:
            return int(line.parent.name)
    raise AssertionError(f"process {pid} of the laptop is gone")


def is_healed(warm: Warm, laptop: Laptop, patience: float = 20) -> bool:
    """Tell whether there is nothing to do any more, within that many seconds."""
    return wait_until(lambda: warm.vmnet(laptop, "plan", check=False).code == 0, patience)


def state_of(warm: Warm, laptop: Laptop, name: str) -> dict[str, Any]:
    """Return what `list` says of a guest."""
    [found] = [info for info in warm.vmnet(laptop, "list", "--json").json if info["name"] == name]
    return dict(found)
