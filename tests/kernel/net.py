"""A laptop, its LAN and the internet, out of network namespaces: real kernels' stacks, fresh for each test.

    internet 198.51.100.2 ---- lan 192.168.77.1 (router and neighbour) ---- wlan0 192.168.77.2 laptop ---- guests

A test asks for the fixtures it needs (`tests/kernel/conftest.py`) and gets them made for it, and taken away after it:

    from tests.kernel.net import Laptop, Machine

    def test_a_guest_answers(laptop: Laptop, internet: Machine) -> None:
        web = laptop.guest("web", "--kind", "tap")       # vmnet create, then a real IP stack behind the tap
        echo = web.serve()                               # port 7, TCP and UDP, and HTTP for whoever says GET
        assert laptop.tcp(web.address, payload=b"hi") == b"hi"
        assert echo.peers == [web.guest_gateway]         # what the guest took the host for
        assert web.ping(internet.address)

- `laptop.vmnet("show", "web")` (also the fixture `vmnet`) runs the command line inside the laptop: network, mount and
  process namespaces of its own, an empty /run, a private copy of /etc, state, run folder, settings and hosts file in
  the test's `tmp_path`. It returns a `Result` (`code`, `out`, `err`, `json`) and fails the test when the code is not 0,
  unless `check=False`. Whatever it leaves running dies with the laptop.
- `laptop.guest(NAME, *OPTIONS)` is `vmnet create` and `laptop.boot(JSON)`; `boot` alone takes the JSON of a guest that
  exists. A veth guest is its namespace as vmnet left it. Behind a tap or tun a namespace of the harness's plays the VM:
  a device `eth0` with the MAC and the addresses of the JSON, frames carried to and from the host's device.
- Any `Machine` (laptop, lan, internet, guests): `run(*argv)` a program inside, `ip(*lines)` as `ip -batch` takes them,
  `sysctl(key[, value])`, `serve(port, address)`, `tcp`, `udp`, `ping`, `trace`, `reaches`, `path_mtu`,
  `send(device, *frames)`, `sniff(device)`, `socket(...)` (a Python socket that lives inside), and `entered()`.
- `laptop.snapshot()` before and after: two dicts of texts, equal when no trace is left.
- `lab.plug("eth9", "10.9.0.0/24")` adds an uplink and returns its router, `laptop.unplug("wlan0")` takes one away;
  `lab.network("10.9.0.0/24")` is a LAN to `lab.join("eth9", router)` as often as the laptop comes by;
  `laptop.rp_filter(2)` sets it everywhere; `lab.narrow(1300)` narrows the way beyond the LAN;
  `lab.machine("other")` is one more machine, for `lab.wire`.

Nothing of the real host is touched: a namespace is held by a file descriptor or by the one process that anchors the
laptop, which ends when this process does, however that comes about.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, Any, Self
from uuid import NAMESPACE_DNS, uuid5

import pytest

import vmnet
from tests.conftest import is_real_root
from tests.kernel.machine import Loop, Machine, new_namespace, wait_until
from vmnet.model import LIBVIRT_BRIDGE

FORMS = {
    "veth-native": ("--kind", "veth", "--native"),
    "veth-mapped": ("--kind", "veth", "--mapped"),
    "tap-mapped": ("--kind", "tap"),
    "tun-native": ("--kind", "tun", "--native"),
    "tun-mapped": ("--kind", "tun", "--mapped"),
}
"""Every kind of guest in every mode it can have: the options of `create`."""

SOURCES = Path(vmnet.__file__).parent.parent
CLIENT = [sys.executable, "-IS", str(SOURCES / "vmnet/__main__.py")]
"""How bin/vmnet calls vmnet."""

_UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork"]
_ANCHOR = """
read pid rest </proc/self/stat
mount -t proc proc /proc && mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /run &&
# No sysctl but those of the network is the laptop's own: whatever it runs, the machine keeps the others.
mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys &&
mount --bind /proc/sys/net /proc/sys/net && mount -o remount,bind,rw /proc/sys/net &&
mkdir /run/netns /run/lock /run/etc /run/etc-work &&
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/etc-work /etc &&
ip link set lo up && echo "$pid" || exit 1
exec env --ignore-signal=CHLD cat  # orphans of the laptop are reaped by the kernel; dash's trap does not do it
"""


def why_not() -> str | None:
    """Say what this process lacks to make namespaces, or None when it lacks nothing."""
    if not sys.platform.startswith("linux"):
        return "needs Linux network namespaces"
    probe = subprocess.run([*_UNSHARE, "mount", "-t", "sysfs", "sysfs", "/sys"], capture_output=True, check=False)
    return (
        None if probe.returncode == 0 else "needs root, or: unshare --user --map-root-user --net --mount --pid --fork"
    )


def why_no_tap() -> str | None:
    """Say why no tap or tun can be made here, or None when one can."""
    return None if os.access("/dev/net/tun", os.R_OK | os.W_OK) else "/dev/net/tun is not ours to open"


def need_own_etc() -> None:
    """Skip where the files of the laptop's /etc cannot be written: in a user namespace their owner has no number."""
    if not is_real_root():
        pytest.skip("needs the machine's own root, to write files of /etc")


@dataclass(frozen=True, slots=True)
class Result:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def forms_here() -> dict[str, tuple[str, ...]]:
    """Return those of `FORMS` that can be made here: all of them, where taps can be opened."""
    return {form: options for form, options in FORMS.items() if form.startswith("veth") or why_no_tap() is None}


class Laptop(Machine):
    """The host: a machine with mounts and processes of its own, on which vmnet runs."""

    lab: "Lab"
    server: "subprocess.Popen[str] | None" = None
    programs: list[str] | None = None

    def __init__(self, lab: "Lab", folder: Path) -> None:
        # A pipe as stdin: cat ends when this process does, and pid 1 takes the whole laptop with it.
        self._anchor = subprocess.Popen(
            [*_UNSHARE, "--kill-child", "--propagation", "private", "sh", "-c", _ANCHOR],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        lab.at_exit(self._end)
        pid = _pipe(self._anchor.stdout).readline().strip()
        assert pid, "the laptop's namespaces cannot be made"
        self.proc = Path("/proc", pid)
        super().__init__(lab, "laptop", os.open(self.proc / "ns/net", os.O_RDONLY | os.O_CLOEXEC))
        lab.at_exit(lambda: os.close(self.fd))
        # An address that is tentative for a second would make two snapshots differ.
        self.sysctl("ipv6/conf/default/accept_dad", 0)
        self.folder = folder
        self.hosts_file = folder / "hosts"
        self.hosts_file.write_text("127.0.0.1 localhost\n127.0.1.1 laptop\n")
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("VMNET_", "SUDO_", "NOTIFY_"))},
            "VMNET_STATE_DIR": str(folder / "state"),
            "VMNET_RUN_DIR": str(folder / "run"),
            "VMNET_CONFIG": str(folder / "config.toml"),
            "VMNET_HOSTS_FILE": str(self.hosts_file),
            "PYTHONPATH": os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }

    def _end(self) -> None:
        _pipe(self._anchor.stdin).close()
        self._anchor.wait()
        _pipe(self._anchor.stdout).close()

    @property
    def namespaces(self) -> list[str]:
        """The namespaces that a process of the laptop's is in."""
        return [f"{self.proc}/ns/{name}" for name in ("net", "mnt", "pid_for_children")]

    def path(self, inside: str) -> Path:
        """Return where a path of the laptop is found from here."""
        return self.proc / "root" / inside.lstrip("/")

    def command(self, *argv: str) -> list[str]:
        """Return the command that runs `argv` inside all of the laptop's namespaces, in this folder."""
        where = [f"--{kind}={file}" for kind, file in zip(("net", "mount", "pid"), self.namespaces, strict=True)]
        return ["nsenter", *where, f"--wd={self.folder}", "--", *argv]

    def run(self, *argv: str, check: bool = True, stdin: str | None = None) -> str:
        """Run a program in all of the laptop's namespaces; see `Machine.run`."""
        done = self.execute(*argv, stdin=stdin)
        assert not check or done.code == 0, f"laptop: {' '.join(argv)}: {done.out}{done.err}"
        return done.out

    def execute(self, *argv: str, stdin: str | None = None, env: dict[str, str] | None = None) -> Result:
        """Run a program in all of the laptop's namespaces, with `env` added to its environment."""
        done = subprocess.run(
            self.command(*argv),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            env={**self.env, **(env or {})},
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, *argv: str) -> subprocess.Popen[str]:
        """Start a program in the laptop and return at once; it ends with the laptop at the latest."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command(*argv), stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=self.env)

    def start_server(self) -> None:
        """Start vmnet's server here; from now on `vmnet` runs the client that looks for it first."""
        self.server = self.start(*self.client, "serve")
        # Whatever it says is shown when a test fails.
        self.server.stderr, errors = sys.stderr, self.server.stderr
        assert errors is not None
        assert "serving" in errors.readline()
        Thread(target=lambda: sys.stderr.writelines(errors), daemon=True).start()
        assert self.is_served(), "the client does not have the server do it"

    def is_served(self, *args: str) -> bool:
        """Run a command that is to succeed, by default a look, and say whether the server did it."""
        python, *words = self.client
        told = self.execute(python, "-X", "importtime", *words, *(args or ("list",)))
        assert told.code == 0, told.err
        return "typer" not in told.err

    @property
    def call(self) -> list[str]:
        """How vmnet is called."""
        return self.client if self.server or self.programs else [sys.executable, "-m", "vmnet"]

    @property
    def client(self) -> list[str]:
        """How the client is called, which looks for a server."""
        return self.programs or CLIENT

    def vmnet(
        self, *args: str, check: bool = True, stdin: str | None = None, env: dict[str, str] | None = None
    ) -> Result:
        """Run the command line in the laptop; with `check` another exit code than 0 fails the test."""
        result = self.execute(*self.call, *args, stdin=stdin, env=env)
        assert not check or result.code == 0, f"vmnet {' '.join(args)}: {result.code}\n{result.out}{result.err}"
        return result

    def guest(self, name: str, *options: str) -> "Guest":
        """Create a guest and boot it; skip the test where its device cannot be opened."""
        return self.guests([name], *options)[0]

    def guests(self, names: list[str], *options: str) -> list["Guest"]:
        """Create guests that are alike, and boot them."""
        if "veth" not in options and "--netns" not in options and (reason := why_no_tap()):
            pytest.skip(reason)
        return [self.boot(info) for info in self.vmnet("create", *names, *options, "--json").json]

    def boot(self, info: dict[str, Any], *, configured: bool = True) -> "Guest":
        """Return the running guest that `info`, its JSON, describes; its NIC has but a MAC if not `configured`."""
        if info["kind"] == "veth":
            path = info["netns"] if info["netns"].startswith("/") else f"/run/netns/{info['netns']}"
            fd = os.open(self.path(path), os.O_RDONLY | os.O_CLOEXEC)
            self.lab.at_exit(lambda: os.close(fd))
            return Guest(self.lab, info, fd)
        guest = Guest(self.lab, info, self.lab.new_namespace())
        outside = self.lab.taps.get(info["name"]) or self.open_device(info["device"], info["kind"])
        inside = guest.open_device("eth0", info["kind"])
        self.lab.wire_up(outside, inside)
        if not configured:
            guest.ip("link set lo up", f"link set eth0 address {info['mac']}")
            return guest
        guest.configure()
        for machine, device in ((self, guest.host_device), (guest, guest.device)):
            machine.await_link(device)
        return guest

    def guest_of_libvirt(self, name: str) -> "Guest":
        """Boot a guest whose tap others make, as libvirt does for a domain on its network `vmnet`: `name` is both's."""
        if reason := why_no_tap():
            pytest.skip(reason)
        self.plug(name)
        return self.boot(self.vmnet("show", name, "--json").json)

    def plug(self, name: str, *, mac: str = "52:54:00:7f:0a:0a", device: str = "vnet7", watched: bool = False) -> None:
        """Make a tap as libvirt does for a domain on its network `vmnet`, for a watcher or for us to take over.

        It is gone when the lab is, or when its descriptor is closed.
        """
        port = (
            f"<hookData><network><name>vmnet</name><bridge name='{LIBVIRT_BRIDGE}'/></network>"
            f"<networkport><owner><name>{name}</name><uuid>{uuid5(NAMESPACE_DNS, name)}</uuid></owner>"
            f"<mac address='{mac}'/></networkport></hookData>"
        )
        self.vmnet("libvirt-hook", "network", "vmnet", "port-created", "begin", "-", stdin=port)
        self.lab.taps[name] = self.open_device(device, "tap")
        self.ip(f"link set {device} address fe{mac[2:]} master {LIBVIRT_BRIDGE} up")
        if not watched:
            self.vmnet("watch", "--once")

    def rp_filter(self, value: int) -> None:
        """Set the reverse-path filter on every device there is and will be, as a distribution may."""
        with self.entered():
            for path in Path("/proc/sys/net/ipv4/conf").glob("*/rp_filter"):
                path.write_text(f"{value}\n")

    def unplug(self, device: str) -> None:
        """Take an uplink away; its routes and addresses go with it."""
        self.ip(f"link del {device}")

    def snapshot(self) -> dict[str, str]:
        """Return all that a visitor could leave behind in the laptop's network, its hosts file included."""
        # An IPv6 address is so for a moment, and shows no route meanwhile.
        assert wait_until(lambda: "tentative" not in self.run("ip", "addr"), 30)
        shown = {
            key: self.run(*key.split())
            for key in (
                "ip -d link",
                "ip addr",
                "ip route show table all",
                "ip -6 route show table all",
                "ip rule",
                "ip -6 rule",
                "ip neigh show nud permanent",
                "ip neigh show proxy",
                "tc qdisc",
                "nft list ruleset",
                "ip netns",
            )
        }
        for link in sorted(self.links()):
            shown[f"tc filter {link}"] = "".join(
                self.run("tc", "filter", "show", "dev", link, where, check=False) for where in ("ingress", "egress")
            )
        return {**shown, **self._sysctls(), "hosts": self.hosts_file.read_text()}

    def _sysctls(self) -> dict[str, str]:
        values = {}
        with self.entered():
            for top in ("ipv4", "ipv6"):
                for path in Path("/proc/sys/net", top).rglob("*"):
                    # Until it is set, a stable_secret cannot be read (EIO); flush files cannot ever. The key of fast
                    # open is the kernel's own, made when the first server offers that, as dnsmasq does.
                    skipped = path.name in ("stable_secret", "tcp_fastopen_key")
                    if path.is_file() and path.stat().st_mode & 0o444 and not skipped:
                        values[str(path)] = path.read_text()
        return values


class Guest(Machine):
    """A guest's own machine; the attributes are those of its JSON, `device` is what its NIC is called inside."""

    lab: "Lab"
    device = "eth0"

    def __init__(self, lab: "Lab", info: dict[str, Any], fd: int) -> None:
        super().__init__(lab, info["name"], fd, info["address"])
        self.info = info
        self.kind: str = info["kind"]
        self.mode: str = info["mode"]
        self.gateway: str = info["gateway"]
        self.shadow: str = info["shadow"]
        self.guest_address: str = info["guest_address"]
        self.guest_gateway: str = info["guest_gateway"]
        self.host_device: str = info["device"]

    def knows(self, other: "Guest") -> str:
        """Return the address by which this guest knows another: its 127 address, or its shadow."""
        return other.address if self.mode == "native" else other.shadow

    def configure(self) -> None:
        """Give the VM its addresses, as its user would by hand."""
        here, gateway, prefix = self.guest_address, self.guest_gateway, self.info["guest_prefix"]
        link = f" address {self.info['mac']}" if self.kind == "tap" else ""
        self.ip("link set lo up", f"link set eth0{link} mtu {self.info['mtu']} up")
        if self.mode == "mapped":
            self.ip(f"addr add {here}/{prefix} dev eth0", f"route add default via {gateway}")
            return
        self.sysctl("ipv4/conf/eth0/route_localnet", 1)
        self.ip(
            f"addr add {here}/{prefix} dev eth0 scope global",
            f"route add default via {gateway} dev eth0",
            "route add local 127.0.0.0/16 dev lo table local scope host src 127.0.0.1",
            f"route add table local {gateway} dev eth0 scope link src {here}",
            f"route add table local 127.0.0.0/10 via {gateway} dev eth0 onlink src {here}",
        )


class Router(Machine):
    """The router of a LAN of the laptop's, and every neighbour that a test needs there."""

    def __init__(self, lab: "Lab", name: str, fd: int, subnet: IPv4Network) -> None:
        super().__init__(lab, name, fd, str(subnet[1]))
        self.subnet = subnet


class Lab:
    """All the machines of one test; leaving the context takes them away."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._uplinks = 0
        self.taps: dict[str, int] = {}
        self.at_exit = self._stack.callback
        try:
            self.loop = Loop()
            self.at_exit(self.loop.close)
            # A thread of their own: a server that waits for room to send waits for frames to be carried.
            self._wires = Loop()
            self.at_exit(self._wires.close)
            self.laptop = Laptop(self, folder)
            self.internet = self.machine("internet", "198.51.100.2")
            self.internet.ip("addr add 198.51.100.2/24 dev lo")
            self.lan = self.plug("wlan0", "192.168.77.0/24")
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def new_namespace(self) -> int:
        """Make an empty network namespace and return its descriptor, closed with the lab."""
        fd = new_namespace()
        self.at_exit(lambda: os.close(fd))
        return fd

    def machine(self, name: str, address: str = "") -> Machine:
        """Return one more machine, with nothing but its lo."""
        made = Machine(self, name, self.new_namespace(), address)
        made.sysctl("ipv4/icmp_ratelimit", 0)
        made.ip("link set lo up")
        return made

    def wire(self, here: Machine, device: str, there: Machine, peer: str) -> None:
        """Join two machines by a cable (a veth), up at both ends."""
        with there.entered():
            fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            with here.entered():
                subprocess.run(
                    ["ip", "link", "add", device, "type", "veth", "peer", "name", peer, "netns", f"/proc/self/fd/{fd}"],
                    pass_fds=[fd],
                    check=True,
                )
        finally:
            os.close(fd)
        here.ip(f"link set {device} up")
        there.ip(f"link set {peer} up")

    def plug(self, device: str, subnet: str, *, default: bool = True) -> "Router":
        """Give the laptop an uplink `device` into a new LAN, and return that LAN's router: `network`, then `join`."""
        router = self.network(subnet)
        self.join(device, router, default=default)
        return router

    def network(self, subnet: str) -> "Router":
        """Make a LAN and return its router, .1 there; its `inet0` leads to the internet, which has a route back."""
        number = self._uplinks
        self._uplinks += 1
        router = Router(self, f"lan{number}" if number else "lan", self.new_namespace(), IPv4Network(subnet))
        router.sysctl("ipv4/icmp_ratelimit", 0)
        router.sysctl("ipv4/ip_forward", 1)
        self.wire(router, "inet0", self.internet, f"isp{number}")
        near, far = f"203.0.113.{4 * number + 1}", f"203.0.113.{4 * number + 2}"
        router.ip("link set lo up", f"addr add {near}/30 dev inet0", f"route add default via {far}")
        self.internet.ip(
            f"addr add {far}/30 dev isp{number}", f"route add {router.subnet} via {near} src {self.internet.address}"
        )
        return router

    def join(self, device: str, router: "Router", *, default: bool = True) -> None:
        """Plug the laptop into a LAN: its `device` and the router's `lan0` are the two ends of a cable.

        The laptop is .2 there, with the default route unless `default` is False.
        """
        prefix = router.subnet.prefixlen
        self.wire(self.laptop, device, router, "lan0")
        router.ip(f"addr add {router.address}/{prefix} dev lan0")
        self.laptop.ip(f"addr add {router.subnet[2]}/{prefix} dev {device}")
        if default:
            self.laptop.ip(f"route replace default via {router.address} dev {device}")

    def narrow(self, mtu: int) -> None:
        """Give the link between the first LAN and the internet an MTU of `mtu` bytes."""
        self.lan.ip(f"link set inet0 mtu {mtu}")
        self.internet.ip(f"link set isp0 mtu {mtu}")

    def wire_up(self, one: int, other: int) -> None:
        """Carry what comes out of either descriptor (of a tap or tun) into the other."""
        self._wires.watch(one, lambda: _carry(one, other))
        self._wires.watch(other, lambda: _carry(other, one))


def _carry(source: int, sink: int) -> None:
    try:
        os.write(sink, os.read(source, 65535))
    except OSError:
        return  # a device that is down takes nothing, as a cable that is not plugged in


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
