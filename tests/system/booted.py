"""A whole machine under qemu, on LANs made of network namespaces: Debian's kernel, systemd, udev, NetworkManager.

    internet 198.51.100.2 ---- lan 192.168.77.1 ---- card 0 (plugged in) \\
                          `--- lan1  10.31.0.1  ---- card 1 (not yet)    / the machine

`Booted(lab, image)` boots it: the lab's laptop is only the cupboard in which qemu runs and cables end. Nothing is
written to the image: what the machine writes is gone with it. The processor is emulated (tcg), 10 to 20 times slower
than a real one, so every order has a generous time limit. `$VMNET_TESTS_ACCEL` names another accelerator, such as kvm.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kernel.machine import Machine, wait_until
from tests.kernel.net import Lab, Result
from tests.system.image import CHECKOUT, PORT, Image

LANS = ("192.168.77.0/24", "10.31.0.0/24")
"""The LANs that the two cards are plugged into."""

INTERNET = "198.51.100.2"

BOOT = 300.0
"""Seconds that a boot may take."""


class Line:
    """A socket on which lines of JSON come and go."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        assert wait_until(path.exists, 30), f"qemu made no {path.name}"
        self._socket.connect(str(path))
        self._rest = b""

    def send(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, wait: float) -> dict[str, Any]:
        """Return the next message; `TimeoutError` after `wait` seconds, `EOFError` when nobody is there any more."""
        end = time.monotonic() + wait
        while b"\n" not in self._rest:
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            more = self._socket.recv(1 << 16)
            if not more:
                raise EOFError("qemu has ended")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._socket.close()


class Booted:
    """The machine; `lans` are the routers of its LANs, and its neighbours there."""

    def __init__(self, lab: Lab, image: Image) -> None:
        self._lab = lab
        self._folder = Path("/tmp", f"vmnet-booted-{os.getpid()}-{id(self):x}")
        self._folder.mkdir()
        lab.at_exit(lambda: subprocess.run(["rm", "-rf", str(self._folder)], check=True))
        self.console = lab.laptop.folder / "console.log"
        self.lans = [lab.lan, lab.plug("wlan1", LANS[1])]
        for number, router in enumerate(self.lans):
            self._cable(number)
            self._serve_addresses(router, LANS[number])
        self._qemu = lab.laptop.start(*self._command(image))
        self._monitor = self._line("monitor")
        self._monitor.receive(30)
        self._ask("qmp_capabilities")
        self.unplug(1)
        self._orders = self._line("orders")
        self.boot_id = ""
        self.await_boot()

    def _line(self, name: str) -> Line:
        try:
            line = Line(self._folder / name)
        except (AssertionError, OSError) as error:
            raise AssertionError(f"{error}: {self._qemu.communicate(timeout=5)}") from error
        self._lab.at_exit(line.close)
        return line

    def _cable(self, number: int) -> None:
        """Join a tap for qemu to the end of the cable that the lab has for the laptop."""
        self._lab.laptop.ip(
            f"addr flush dev wlan{number}",
            f"tuntap add card{number} mode tap",
            f"link add wall{number} type bridge",
            f"link set card{number} master wall{number} up",
            f"link set wlan{number} master wall{number}",
            f"link set wall{number} addrgenmode none up",
        )

    def _serve_addresses(self, router: Machine, subnet: str) -> None:
        """Start the DHCP and DNS server of a LAN."""
        stem = subnet.removesuffix(".0/24")
        with router.entered():
            server = subprocess.Popen(
                [
                    *(
                        "dnsmasq",
                        "--keep-in-foreground",
                        "--conf-file=/dev/null",
                        "--no-hosts",
                        "--no-resolv",
                        "--user=root",
                    ),
                    *(f"--dhcp-range={stem}.50,{stem}.99,1h", f"--dhcp-leasefile={self._folder}/{router.name}.leases"),
                    *(f"--address=/internet.example/{INTERNET}", "--interface=lan0", "--bind-interfaces"),
                    f"--pid-file={self._folder}/{router.name}.pid",
                ],
                stderr=subprocess.DEVNULL,
            )
        self._lab.at_exit(server.wait)
        self._lab.at_exit(server.terminate)

    def _command(self, image: Image) -> list[str]:
        checkout = self._folder / "checkout.tar"
        pack = "git -c safe.directory='*' ls-files -z --cached --others --exclude-standard"
        subprocess.run(
            [
                "sh",
                "-euc",
                f'{pack} | tar --create --file="$1" --null --ignore-failed-read --files-from=-',
                "sh",
                checkout,
            ],
            cwd=CHECKOUT,
            check=True,
        )
        command = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-snapshot"),
            *("-machine", "q35", "-accel", os.environ.get("VMNET_TESTS_ACCEL", "tcg,thread=multi"), "-cpu", "max"),
            *("-smp", "2", "-m", "2048"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            *("-append", "root=/dev/vda rw console=ttyS0 quiet panic=-1"),
            *("-serial", f"file:{self.console}"),
            *("-qmp", f"unix:{self._folder}/monitor,server=on,wait=off"),
            *("-drive", f"file={image.disk},format=raw,if=virtio,cache=unsafe"),
            *("-drive", f"file={checkout},format=raw,if=virtio,readonly=on"),
            *(
                "-device",
                "virtio-serial-pci",
                "-chardev",
                f"socket,id=orders,path={self._folder}/orders,server=on,wait=off",
            ),
            *("-device", f"virtserialport,chardev=orders,name={PORT}"),
            *("-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"),
        ]
        for number in range(len(LANS)):
            command += ["-netdev", f"tap,id=card{number},ifname=card{number},script=no,downscript=no"]
            command += [
                "-device",
                f"virtio-net-pci,id=nic{number},netdev=card{number},mac=52:54:00:31:00:0{number},romfile=",
            ]
        return command

    def _ask(self, command: str, **arguments: object) -> Any:
        """Give qemu a command of its monitor (QMP) and return the answer."""
        self._monitor.send({"execute": command, "arguments": arguments})
        while "return" not in (answer := self._monitor.receive(30)):
            assert "error" not in answer, f"{command}: {answer}"
        return answer["return"]

    def plug(self, number: int) -> None:
        """Plug the cable into a card."""
        self._ask("set_link", name=f"nic{number}", up=True)

    def unplug(self, number: int) -> None:
        """Pull the cable out of a card."""
        self._ask("set_link", name=f"nic{number}", up=False)

    def await_boot(self) -> None:
        """Wait until the machine that boots takes orders, has started all that it starts, and is in its LAN."""
        try:
            while not (ready := self._orders.receive(BOOT).get("ready")) or ready == self.boot_id:
                pass
        except (TimeoutError, EOFError) as error:
            raise AssertionError(f"the machine does not boot: {error}\n{self.console.read_text()[-4000:]}") from error
        self.boot_id = ready
        self.execute("systemctl", "is-system-running", "--wait", timeout=BOOT)
        self.await_("ip", "route", "get", INTERNET, until=lambda done: done.code == 0)

    def reboot(self) -> None:
        """Boot the machine anew, in the orderly way."""
        self._orders.send({"argv": ["systemctl", "reboot"], "stdin": "", "timeout": 60})
        self.await_boot()

    def execute(self, *argv: str, stdin: str = "", timeout: float = 120) -> Result:
        """Run a program in the machine, as root, and return how it ended: with 124 after `timeout` seconds."""
        self._orders.send({"argv": argv, "stdin": stdin, "timeout": timeout})
        while "code" not in (answer := self._orders.receive(timeout + 60)):
            assert "ready" not in answer, f"{' '.join(argv)}: the machine has booted anew"
        return Result(answer["code"], answer["out"], answer["err"])

    def run(self, *argv: str, check: bool = True, stdin: str = "", timeout: float = 120) -> str:
        """Run a program in the machine and return its output; with `check` a failure fails the test."""
        done = self.execute(*argv, stdin=stdin, timeout=timeout)
        assert not check or done.code == 0, f"machine: {' '.join(argv)}: {done.code}\n{done.out}{done.err}"
        return done.out

    def await_(self, *argv: str, until: Callable[[Result], bool], timeout: float = 60) -> Result:
        """Run a program again and again until its result will do; the last one fails the test when none does."""
        results: list[Result] = []

        def met() -> bool:
            results.append(self.execute(*argv))
            return until(results[-1])

        assert wait_until(met, timeout), f"machine: {' '.join(argv)}: never as expected, at last {results[-1]}"
        return results[-1]
