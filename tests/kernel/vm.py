"""A real VM on a guest's tap: Debian's kernel and one busybox under qemu, which knows nothing of vmnet.

    from tests.kernel.vm import boot

    def test_a_vm_has_its_address(laptop: Laptop, internet: Machine) -> None:
        one, two = boot(laptop, "one", "two")          # vmnet create, then both boot at once: 3 to 6 s
        assert one.http() == f"one {one.shadow}"       # GET /, from the laptop, at its 127.1.x.x
        assert one.run("wget -qO- http://two/cgi-bin/peer") == f"two sees {one.shadow}"
        one.reboot()

`run` goes by a serial port, whatever has become of the VM's network. `VM(laptop, info)` only starts a VM, for the guest
that `info`, its JSON, describes: `mac=` gives it another MAC than the record's, `static=` an address of its own choice
instead of DHCP; then `await_ready()`. `says` returns what it writes to its console (`tests/guest/init`). It ends with
the laptop at the latest. The processor is emulated (tcg), 10 to 20 times slower than a real one, so every wait has a
generous limit.

It is built once, of packages that apt downloads (28 MB) and that are not installed, and kept with what
`tests/system/roots.py` keeps.
"""

import http.client
import json
import platform
import re
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.machine import wait_until
from tests.kernel.net import Laptop, why_no_tap
from tests.system.roots import made_once

LIMIT = 60.0
"""Seconds that a boot, or a command inside, may take."""

_GUEST = Path(__file__).parents[1] / "guest"
_KERNELS = "linux-image-cloud-amd64"


@cache
def vm_files() -> Path:
    """Return the folder with the VM's `vmlinuz` and `initrd.img`, made now unless they are there.

    Skips the test where no VM can be made or started, and says why.
    """
    if reason := why_no_tap():
        pytest.skip(reason)
    if platform.machine() != "x86_64":
        pytest.skip("the VM to boot is an x86_64, and this is none")
    for program in ("qemu-system-x86_64", "apt-get", "dpkg-deb"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}, to boot a VM")
    # The package of this name only depends on the one with today's kernel in it.
    found = re.search(r"Depends: (linux-image-\S+)", _output("apt-cache", "depends", "--important", _KERNELS))
    if not found:
        pytest.skip(f"apt knows no {_KERNELS}, to boot a VM: another distribution, or apt-get update is due")
    packages = [found[1], "busybox-static"]
    versions = _output("apt-get", "-qq", "download", "--print-uris", *packages)
    recipe = [path.read_text() for path in (_GUEST / "build", _GUEST / "init")]
    with made_once("vm", versions, *recipe) as (place, work):
        if work is not None:
            _make(work, packages)
    return place


def _output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


def _make(work: Path, packages: list[str]) -> None:
    made = work / "made"
    made.mkdir()
    # As root apt would hand the download to a user of its own, who may not write here.
    fetch = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *packages]
    fetched = subprocess.run(fetch, cwd=work, capture_output=True, text=True, check=False)
    if fetched.returncode != 0:
        pytest.skip(f"no packages for a VM (apt-get update may be due): {fetched.stderr.strip().splitlines()[-1]}")
    files = [next(work.glob(f"{package}_*.deb")) for package in packages]
    built = subprocess.run([_GUEST / "build", made, *files], capture_output=True, text=True, check=False)
    if built.returncode != 0:
        raise RuntimeError(f"{built.stdout[-2000:]}{built.stderr[-2000:]}")


def boot(laptop: Laptop, *names: str, options: tuple[str, ...] = ()) -> list["VM"]:
    """Create guests of kind tap, with `options` of create, and boot them all at once; return them when ready."""
    vm_files()
    made = laptop.vmnet("create", *names, "--kind", "tap", *options, "--json").json
    machines = [VM(laptop, info) for info in made]
    for machine in machines:
        machine.await_ready()
    return machines


class Line:
    """Our end of a serial port or of qemu's monitor."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = ours
        self._rest = b""

    def send(self, text: str) -> None:
        self._socket.sendall(text.encode())

    def until(self, mark: str, seconds: float) -> str:
        """Return what comes before `mark`, which is swallowed; `TimeoutError`, and `EOFError` when qemu has ended."""
        end = time.monotonic() + seconds
        while mark.encode() not in self._rest:
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            more = self._socket.recv(1 << 16)
            if not more:
                raise EOFError("qemu has ended")
            self._rest += more
        text, _, self._rest = self._rest.partition(mark.encode())
        return text.decode()

    def close(self) -> None:
        self._socket.close()


class Booted:
    """The tiny VM, whoever started it: its console, a file, its shell and its web server."""

    def __init__(self, laptop: Laptop, name: str, address: str, console: Path, shell: Line) -> None:
        self._laptop = laptop
        self._runs = 0
        self._boots = 0
        self.name = name
        self.address = address
        self.console = console
        self._shell = shell

    def says(self, word: str) -> list[dict[str, str]]:
        """Return what stands on the console so far in lines with `word`: their `key=value`s."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        lines = text.rpartition("\n")[0].splitlines()  # a line appears letter by letter
        found = [line.split() for line in lines if line.startswith(f"VMNET-GUEST {word} ")]
        return [dict(pair.partition("=")[::2] for pair in words[2:]) for words in found]

    def await_says(self, word: str, times: int = 1) -> dict[str, str]:
        """Wait until the console has had `word` so many times, and return the last."""
        assert wait_until(lambda: len(self.says(word)) >= times, LIMIT), f"{self.name}: no {word}\n{self._log()}"
        return self.says(word)[-1]

    def await_ready(self) -> None:
        """Wait until the boot is done, with an address or without: `says("nolease")` tells."""
        self._boots += 1
        self.await_says("ready", self._boots)

    def http(self, path: str = "/") -> str:
        """GET from the laptop, at the VM's 127.1.x.x; `OSError` when there is no answer."""
        with self._laptop.entered():
            connection = http.client.HTTPConnection(self.address, timeout=10)
            connection.connect()
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode().strip()
        finally:
            connection.close()

    def run(self, script: str, *, check: bool = True) -> str:
        """Run a shell script in the VM, as root, and return its output; with `check` a failure fails the test."""
        self._runs += 1
        start, end = f"<{self._runs}>", f"</{self._runs}>"
        self._shell.send(f"echo '{start}'; ( {script}\n) </dev/null 2>&1; echo '{end}' $?.\n")
        try:
            self._shell.until(f"{start}\n", LIMIT)
            output, code = self._shell.until(end, LIMIT), self._shell.until(".\n", LIMIT).strip()
        except (EOFError, OSError) as error:
            raise AssertionError(f"{self.name}: {script}: {error}\n{self._log()}") from error
        assert not check or code == "0", f"{self.name}: {script}: {code}\n{output}"
        return output.strip()

    def send(self, text: str) -> None:
        """Type into its shell, and wait for nothing."""
        self._shell.send(text)

    def _log(self) -> str:
        return "".join(
            path.read_text(errors="replace")[-4000:] for path in self.console.parent.glob(f"{self.console.stem}.*")
        )


class VM(Booted):
    """A VM that was started; the attributes are those of its guest's JSON."""

    def __init__(self, laptop: Laptop, info: dict[str, Any], *, mac: str = "", static: str = "") -> None:
        number = len(list(laptop.folder.glob("*.console")))
        monitor, shell = socket.socketpair(), socket.socketpair()
        self._monitor = Line(monitor[0])
        super().__init__(
            laptop, info["name"], info["address"], laptop.folder / f"{info['name']}-{number}.console", Line(shell[0])
        )
        self.info = info
        self.shadow: str = info["shadow"]
        self.guest_gateway: str = info["guest_gateway"]
        self.device: str = info["device"]
        self.mac: str = mac or info["mac"]
        words = f"vmnet.ip={static} vmnet.gw={self.guest_gateway}" if static else ""
        self._qemu = self._start(monitor[1], shell[1], words)
        laptop.lab.at_exit(self._end)
        self._monitor.until("\n", LIMIT)
        self._ask("qmp_capabilities")

    def _start(self, monitor: socket.socket, shell: socket.socket, words: str) -> subprocess.Popen[bytes]:
        files = vm_files()
        command = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "128"),
            *("-kernel", f"{files}/vmlinuz", "-initrd", f"{files}/initrd.img"),
            *("-append", f"console=ttyS0 quiet panic=-1 {words}"),
            *("-serial", f"file:{self.console}"),
            *("-chardev", f"socket,id=shell,fd={shell.fileno()}", "-serial", "chardev:shell"),
            *("-chardev", f"socket,id=monitor,fd={monitor.fileno()}", "-mon", "chardev=monitor,mode=control"),
            *("-netdev", f"tap,id=n0,ifname={self.device},script=no,downscript=no"),
            *("-device", f"virtio-net-pci,netdev=n0,mac={self.mac},romfile="),
        ]
        with monitor, shell, self.console.with_suffix(".qemu").open("wb") as log:
            return subprocess.Popen(
                self._laptop.command(*command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[monitor.fileno(), shell.fileno()],
            )

    def _end(self) -> None:
        self.kill()
        self._monitor.close()
        self._shell.close()

    def _ask(self, command: str) -> None:
        """Give qemu a command of its monitor (QMP), and wait until it is carried out."""
        self._monitor.send(json.dumps({"execute": command}) + "\n")
        try:
            while "return" not in (answer := json.loads(self._monitor.until("\n", LIMIT))):
                assert "error" not in answer, f"{command}: {answer}"
        except (EOFError, OSError) as error:
            raise AssertionError(f"{self.name}, {command}: {error}\n{self._log()}") from error

    def pause(self) -> None:
        """Stop the VM's processor."""
        self._ask("stop")

    def resume(self) -> None:
        """Let it go on."""
        self._ask("cont")

    def reboot(self) -> None:
        """Boot anew, as the VM's own root does it."""
        self.send("reboot -f\n")
        self.await_ready()

    def kill(self) -> None:
        """End qemu; the VM hears nothing of it and releases no lease."""
        with suppress(OSError):
            self._monitor.send('{"execute": "quit"}\n')
        self._qemu.wait(LIMIT)
