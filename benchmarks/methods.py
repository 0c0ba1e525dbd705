"""Ways to give containers a network: vmnet, its peers, and the floor under all of them.

Each way has a laptop of its own and names its guests by their network namespaces. `create` and `delete` prepare what
they can beforehand; only the programs' own time counts.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.lab import Command, Laptop, Took
from vmnet.client import SOCKET

_CNI = Path("/usr/lib/cni")
_NETAVARK = Path("/usr/lib/podman/netavark")
_NETNS = Path("/run/netns")
_SOURCES = Path(__file__).resolve().parent.parent / "src"
_PLAN_NOT_EMPTY = 10
_DOOMED = 77777
_ANSWERING = """import os, socket, sys
from vmnet.client import BEGUN, EXITED, SOCKET
os.mkdir(sys.argv[1])
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(f"{sys.argv[1]}/.{SOCKET}")
listener.listen()
os.rename(f"{sys.argv[1]}/.{SOCKET}", f"{sys.argv[1]}/{SOCKET}")
while True:
    client, _ = listener.accept()
    _, descriptors, _, _ = socket.recv_fds(client, 1 << 18, 4)
    client.send(BEGUN)
    client.send(EXITED + b"0")
    for descriptor in descriptors:
        os.close(descriptor)
    client.close()
"""
_FLOOR_RULES = """table ip floor {
  set guests { type ipv4_addr; }
  chain post { type nat hook postrouting priority 100; ip saddr @guests masquerade; }
}
"""


class Method:
    """A way to make guests. `makes_netns`: it makes namespaces that are not there by itself."""

    makes_netns = False

    def __init__(self, name: str, laptop: Laptop) -> None:
        self.name = name
        self.laptop = laptop

    @staticmethod
    def missing() -> str | None:
        """Say what has to be installed first, or None."""
        return None

    def prepare(self) -> None:
        """Do what is done once, before the first guest."""

    def create(self, names: Sequence[str]) -> Took:
        """Make guests; returns what it took in all. Raises Failed."""
        raise NotImplementedError

    def delete(self, names: Sequence[str]) -> Took:
        """Take guests away, and namespaces that this way made; returns what it took in all. Raises Failed."""
        raise NotImplementedError

    def address(self, name: str) -> str:
        """Return how the host reaches a guest."""
        raise NotImplementedError

    def close(self) -> None:
        """End what `prepare` has started."""


class Vmnet(Method):
    """vmnet's own command, one for all guests; `options` go to create."""

    makes_netns = True

    def __init__(self, name: str, laptop: Laptop, options: Sequence[str] = ("--kind", "veth")) -> None:
        super().__init__(name, laptop)
        self._options = options
        hosts = laptop.folder / "hosts"
        shutil.copy("/etc/hosts", hosts)
        self.environment = {
            "PYTHONPATH": str(_SOURCES),
            "VMNET_STATE_DIR": str(laptop.folder / "state"),
            "VMNET_RUN_DIR": "/run/vmnet",
            "VMNET_CONFIG": str(laptop.folder / "config.toml"),
            "VMNET_HOSTS_FILE": str(hosts),
        }

    @staticmethod
    def missing() -> str | None:
        return None if shutil.which("nft", path="/usr/sbin:/usr/bin") else "nftables"

    def command(self, *words: str) -> Command:
        """Return a call of vmnet in this laptop."""
        # -P: the folder of that file, which has modules called as some of the standard library, is not looked into.
        return Command(
            [sys.executable, "-P", str(_SOURCES / "vmnet" / "__main__.py"), *words], environment=self.environment
        )

    def prepare(self) -> None:
        self.laptop.run(self.command("carve"))

    def close(self) -> None:
        self.laptop.run(self.command("restore"))  # and with it what answers guests ends

    def create(self, names: Sequence[str]) -> Took:
        netns = ["--netns", names[0]] if len(names) == 1 and "veth" in self._options else []
        return self.laptop.run(self.command("create", *names, *self._options, *netns))

    def delete(self, names: Sequence[str]) -> Took:
        return self.laptop.run(self.command("delete", *names))

    def address(self, name: str) -> str:
        return self.laptop.output(self.command("ip", name)).strip()


class Served(Vmnet):
    """The same with a server, which is there from `prepare` on; processor time is that of the client alone."""

    def __init__(self, name: str, laptop: Laptop, options: Sequence[str] = ("--kind", "veth")) -> None:
        super().__init__(name, laptop, options)
        self._server = 0

    def command(self, *words: str) -> Command:
        """Return a call of vmnet as bin/vmnet makes it."""
        return Command(
            [sys.executable, "-IS", str(_SOURCES / "vmnet" / "__main__.py"), *words], environment=self.environment
        )

    def prepare(self) -> None:
        super().prepare()
        self._server = self.laptop.start(self.command("serve"))
        with self.laptop.entered():
            while not Path("/run/vmnet/server.sock").exists():
                time.sleep(0.01)

    @contextmanager
    def answering(self) -> Iterator[dict[str, str]]:
        """Have somebody in this laptop who says of each command that it is done; yield the environment to get there."""
        argv = [sys.executable, "-P", "-c", _ANSWERING, "/run/idle"]
        pid = self.laptop.start(Command(argv, environment=self.environment))
        try:
            with self.laptop.entered():
                while not Path("/run/idle", SOCKET).exists():
                    time.sleep(0.01)
            yield {**self.environment, "VMNET_RUN_DIR": "/run/idle"}
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def close(self) -> None:
        super().close()
        if self._server:
            os.kill(self._server, signal.SIGTERM)
            os.waitpid(self._server, 0)
            self._server = 0


class Floor(Method):
    """floor.c: the kernel's own work. `filters`: with the three messages more that a guest of vmnet has."""

    makes_netns = True

    def __init__(self, name: str, laptop: Laptop, program: str, *, filters: bool) -> None:
        super().__init__(name, laptop)
        self._program = program
        self._filters = filters
        self._made_names = False

    @staticmethod
    def missing() -> str | None:
        return None if shutil.which("gcc") and shutil.which("nft", path="/usr/sbin:/usr/bin") else "gcc nftables"

    def prepare(self) -> None:
        _load_floor_rules(self.laptop)

    def create(self, names: Sequence[str]) -> Took:
        with self.laptop.entered():
            self._made_names = not (_NETNS / names[0]).exists()
        return self._run("create", names, flag=self._filters)

    def delete(self, names: Sequence[str]) -> Took:
        return self._run("delete", names, flag=self._made_names)

    def _run(self, verb: str, names: Sequence[str], *, flag: bool) -> Took:
        first = names[0].removeprefix("f")
        return self.laptop.run(Command([self._program, verb, first, str(len(names)), str(_NETNS), str(int(flag))]))

    def address(self, name: str) -> str:
        number = 0x7F010002 + 4 * int(name.removeprefix("f"))
        return ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))


class Each(Method):
    """A way that runs programs for each guest."""

    def create(self, names: Sequence[str]) -> Took:
        return self._run(self.adding, names)

    def delete(self, names: Sequence[str]) -> Took:
        return self._run(self.deleting, names)

    def _run(self, command: Callable[[str], Command], names: Sequence[str]) -> Took:
        return sum((self.laptop.run(command(name)) for name in names), Took())

    def adding(self, name: str) -> Command:
        """Return the program that makes a guest."""
        raise NotImplementedError

    def deleting(self, name: str) -> Command:
        """Return the program that takes it away."""
        raise NotImplementedError


class Cni(Each):
    """A CNI plugin, ptp or bridge, with host-local and masquerading, called as a runtime calls it."""

    def __init__(self, name: str, laptop: Laptop, plugin: str) -> None:
        super().__init__(name, laptop)
        self._plugin = plugin
        ranges = [[{"subnet": "10.50.0.0/16"}]]
        ipam = {
            "type": "host-local",
            "ranges": ranges,
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(laptop.folder / "cni"),
        }
        bridge = {"bridge": "cni0", "isGateway": True} if plugin == "bridge" else {}
        self._config = laptop.folder / "cni.json"
        self._config.write_text(
            json.dumps({"cniVersion": "0.4.0", "name": "bench", "type": plugin, "ipMasq": True, "ipam": ipam, **bridge})
        )

    @staticmethod
    def missing() -> str | None:
        programs = (_CNI / "ptp", _CNI / "bridge", _CNI / "host-local")
        there = all(os.access(program, os.X_OK) for program in programs) and shutil.which("iptables", path="/usr/sbin")
        return None if there else "containernetworking-plugins iptables"

    def _call(self, verb: str, name: str) -> Command:
        environment = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": name,
            "CNI_NETNS": str(_NETNS / name),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(_CNI),
        }
        return Command([str(_CNI / self._plugin)], self._config, environment)

    def adding(self, name: str) -> Command:
        return self._call("ADD", name)

    def deleting(self, name: str) -> Command:
        return self._call("DEL", name)

    def address(self, name: str) -> str:
        return _address_inside(self.laptop, name)


class Netavark(Each):
    """Podman's netavark with one bridge, without DNS."""

    _used = 1

    @staticmethod
    def missing() -> str | None:
        there = os.access(_NETAVARK, os.X_OK) and shutil.which("iptables", path="/usr/sbin")
        return None if there else "netavark iptables (Debian: podman)"

    def _call(self, verb: str, name: str) -> Command:
        config = self.laptop.folder / f"{name}.json"
        if verb == "setup":
            self._used += 1
            config.write_text(json.dumps(_netavark_options(name, f"10.60.{self._used >> 8}.{self._used & 255}")))
        arguments = ["--config", "/run/netavark", verb, str(_NETNS / name)]
        return Command([str(_NETAVARK), *arguments], config)

    def adding(self, name: str) -> Command:
        return self._call("setup", name)

    def deleting(self, name: str) -> Command:
        return self._call("teardown", name)

    def address(self, name: str) -> str:
        return _address_inside(self.laptop, name)


def _netavark_options(name: str, address: str) -> dict[str, object]:
    network = {
        "name": "bench",
        "id": "53ce4390f2adb1681eb1a90ec8b48c49c015e0a8d336c197637e7f65e365fa9e",
        "driver": "bridge",
        "network_interface": "podman9",
        "subnets": [{"subnet": "10.60.0.0/16", "gateway": "10.60.0.1"}],
        "ipv6_enabled": False,
        "internal": False,
        "dns_enabled": False,
        "ipam_options": {"driver": "host-local"},
    }
    return {
        "container_id": name,
        "container_name": name,
        "networks": {"bench": {"static_ips": [address], "interface_name": "eth0"}},
        "network_info": {"bench": network},
    }


def _address_inside(laptop: Laptop, name: str) -> str:
    [device] = json.loads(laptop.output(Command(["ip", "-j", "-4", "addr", "show", "dev", "eth0"]), netns=name))
    return str(device["addr_info"][0]["local"])


class IpBatch(Each):
    """`ip -batch` on the host and in the guest, and `nft -f` for the guest's element."""

    @staticmethod
    def missing() -> str | None:
        return Vmnet.missing()

    def prepare(self) -> None:
        _load_floor_rules(self.laptop)

    def adding(self, name: str) -> Command:
        folder, device = self.laptop.folder, f"ipb-{name}"
        (folder / "host").write_text(
            f"link add {device} mtu 1500 numtxqueues 1 numrxqueues 1 type veth "
            f"peer name eth0 mtu 1500 numtxqueues 1 numrxqueues 1 netns {name}\n"
            f"addr add 127.1.0.1/30 dev {device} scope global\nlink set {device} up\n"
        )
        (folder / "guest").write_text(
            "addr add 127.0.0.1/16 dev lo\naddr del 127.0.0.1/8 dev lo\n"
            "addr add 127.1.0.2/30 dev eth0 scope global\nlink set eth0 up\nroute add default via 127.1.0.1\n"
        )
        (folder / "element").write_text("add element ip floor guests { 127.1.0.2 }\n")
        script = f"ip -batch {folder}/host && ip -n {name} -batch {folder}/guest && nft -f {folder}/element"
        return Command(["sh", "-c", script])

    def deleting(self, name: str) -> Command:
        script = f"ip link del ipb-{name} && nft delete element ip floor guests '{{ 127.1.0.2 }}'"
        return Command(["sh", "-c", script])


class IpTaps(Method):
    """What vmnet does for taps, done by `ip -batch`, `sysctl -p` and `tc -batch`: the lines are those of its plan."""

    def __init__(self, name: str, laptop: Laptop) -> None:
        super().__init__(name, laptop)
        self._vmnet = Vmnet(name, laptop, ())

    @staticmethod
    def missing() -> str | None:
        return Vmnet.missing()

    def prepare(self) -> None:
        self._vmnet.prepare()

    def create(self, names: Sequence[str]) -> Took:
        plan = self.laptop.output(self._vmnet.command("create", *names, "--dry-run", "-v"), code=_PLAN_NOT_EMPTY)
        links, sysctls, filters, rest = ([], [], [], [])  # type: tuple[list[str], list[str], list[str], list[str]]
        for line in plan.splitlines():
            program, _, words = line.partition(" ")
            if program == "sysctl":
                sysctls += words.removeprefix("-qw ").split()
            elif program == "tc":
                filters.append(words.replace("'", '"'))
            elif program == "ip" and "again: persistent" not in words:
                # What vmnet does after it, it does only once the filters stand.
                late = words.startswith(("addr", "route", "neigh")) or words.endswith(" up")
                (rest if late else links).append(words)
        for file, lines in (("links", links), ("sysctls", sysctls), ("filters", filters), ("rest", rest)):
            (self.laptop.folder / file).write_text("".join(f"{line}\n" for line in lines))
        steps = "ip -batch links && sysctl -qp sysctls && tc -batch filters && ip -batch rest"
        return self.laptop.run(Command(["sh", "-c", f"cd {self.laptop.folder} && {steps}"]))

    def delete(self, names: Sequence[str]) -> Took:
        doomed = [f"link set vmn-{name} group {_DOOMED}\n" for name in names] + [f"link del group {_DOOMED}\n"]
        (self.laptop.folder / "links").write_text("".join(doomed))
        return self.laptop.run(Command(["ip", "-batch", str(self.laptop.folder / "links")]))


def _load_floor_rules(laptop: Laptop) -> None:
    rules = laptop.folder / "floor.nft"
    rules.write_text(_FLOOR_RULES)
    laptop.run(Command(["nft", "-f", str(rules)]))
    # The unsafe shortcut that vmnet exists to avoid: without it no answer from outside gets back to a 127 address.
    laptop.run(Command(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.route_localnet=1"]))
