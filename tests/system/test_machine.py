"""A whole machine: Debian's kernel, systemd, udev and NetworkManager, and what only they can show.

Each test boots a machine of its own (about 20 s), puts this checkout into it and goes by the README.
"""

import json
from typing import Any

import pytest

from tests.kernel.machine import ECHO_PORT, QUIET, Machine
from tests.kernel.net import Lab
from tests.system.booted import INTERNET, Booted
from tests.system.image import machine_image

pytestmark = [pytest.mark.long, pytest.mark.root]

VMNET = "/root/vmnet/bin/vmnet"
WEB = ("ip", "netns", "exec", "web")
LOOPBACK = ("127.0.0.1", "127.0.0.53", "127.1.0.1", "127.200.0.1")

_TALK = """
import socket, sys, time
line = socket.create_connection((sys.argv[1], 7), 30)
line.settimeout(60)
said = 0
while True:
    line.sendall(b"x")
    assert line.recv(1) == b"x", "closed"
    said += 1
    print(said, flush=True)
    time.sleep(0.2)
"""
# What a visitor could leave behind. Lifetimes run; addrgenmode is NetworkManager's, which sets it on lo too, some time
# after it hears that the device is for it to manage again.
_TRACES = {
    "links": "ip -d link | sed 's/addrgenmode [a-z0-9]*//'",
    "addresses": "ip addr | grep -v valid_lft",
    "routes": "ip route show table all; ip -6 route show table all | sed 's/expires.*//'",
    "rules": "ip rule; ip -6 rule",
    "neighbours": "ip neigh show nud permanent",
    "filters": "tc qdisc; for dev in /sys/class/net/*; do tc filter show dev ${dev##*/} ingress; done",
    "nftables": "nft list ruleset",
    "sysctls": "sysctl -a 2>/dev/null | grep -E '^net[.](ipv4|ipv6)[.](conf|ip_forward)'",
    "namespaces": "ip netns",
    "files": "find /etc /usr/lib/systemd /usr/local /run/systemd/system -not -type d "
    "-not -path '/etc/resolv.conf' 2>/dev/null | sort | xargs stat -c '%A %u %g %N'",
    "contents": "find /etc -type f -not -path /etc/resolv.conf | sort | xargs md5sum",
    "units": "systemctl list-unit-files --no-legend --plain | awk '$2 != \"transient\" {print $1, $2}'",
}

_ANSWERED = """
test "$(pgrep -c -x dnsmasq)" = 3 && systemctl -q is-active vmnet-dnsmasq &&
/root/vmnet/bin/vmnet exec web -- getent ahostsv4 myvm.vmnet.internal | grep -q '^127.1.0.2 '
"""
# What befalls a laptop, and how to see that it is put right.
_DAMAGES = {
    "ip addr del 247.1.0.5/30 dev vmn-web": "ip addr show dev vmn-web | grep -q 247.1.0.5/30",
    "nft flush ruleset": "nft list chain ip vmnet late",
    "ip link del vmn-myvm": "ip addr show dev vmn-myvm | grep -q 247.1.0.1/30",
    "ip link del vmn-web": "ip addr show dev vmn-web | grep -q 247.1.0.5/30",
    "ip addr add 127.0.0.1/8 dev lo": "! ip addr show dev lo | grep -q 127.0.0.1/8",
    "sysctl net.ipv4.ip_forward=0": "sysctl -n net.ipv4.ip_forward | grep 1",
    "systemctl kill --signal=KILL vmnet-dnsmasq": _ANSWERED,
    "systemctl stop vmnet-dnsmasq": _ANSWERED,
    "pkill -KILL -x dnsmasq": _ANSWERED,
}


@pytest.fixture
def machine(lab: Lab) -> Booted:
    """The booted machine, with this checkout in /root/vmnet; the internet has an echo server."""
    lab.internet.serve()
    booted = Booted(lab, machine_image())
    booted.run("tar", "-xf", "/dev/vdb", "-C", "/root/vmnet")
    return booted


def vmnet(machine: Booted, *arguments: str) -> str:
    return machine.run(VMNET, *arguments)


def serve(machine: Booted, *inside: str) -> None:
    """Start the echo service of RFC 862, TCP and UDP, in the machine, or by the command `inside` in a guest of its."""
    for kind in ("TCP-LISTEN", "UDP-LISTEN"):
        machine.run("systemd-run", *inside, "socat", f"{kind}:{ECHO_PORT},fork,reuseaddr", "PIPE")


def asks(machine: Booted, address: str, *inside: str) -> bool:
    """Tell whether the echo server at `address` answers the machine, or a guest of its."""
    client = ["socat", "-t5", "-", f"TCP:{address}:{ECHO_PORT},connect-timeout=5"]
    return machine.execute(*inside, *client, stdin="hello").out == "hello"


def uplink_address(machine: Booted) -> str:
    """Return the address that the machine has on the LAN it is in."""
    [route] = json.loads(machine.run("ip", "-j", "route", "get", INTERNET))
    return str(route["prefsrc"])


def differs(machine: Booted) -> str:
    """Return what `vmnet plan` would do, when all that reacts to changes of the network has done so; "" for nothing."""
    machine.run("udevadm", "settle")
    machine.run("sleep", "5")
    done = machine.execute(VMNET, "plan")
    assert done.code in (0, 10), done
    return done.out if done.code else ""


def since(machine: Booted, unit: str) -> int:
    """Return when a unit came up, in microseconds since the boot."""
    return int(machine.run("systemctl", "show", "-P", "ActiveEnterTimestampMonotonic", unit))


def traces(machine: Booted) -> dict[str, str]:
    """Return all that a visitor could leave behind in the machine."""
    return {what: machine.run("sh", "-c", script, check=False) for what, script in _TRACES.items()}


def assert_nobody_gets_in(machine: Booted, neighbour: Machine, guest: dict[str, Any]) -> None:
    """Have a LAN neighbour, who routes all of 127/8 and 247/8 to the machine, ask for what is closed."""
    way = uplink_address(machine)
    neighbour.sysctl("ipv4/conf/lan0/route_localnet", 1)
    neighbour.ip("addr flush dev lo", f"route replace 127.0.0.0/8 via {way}", f"route replace 247.0.0.0/8 via {way}")
    assert neighbour.reaches(way) == {"tcp", "udp", "ping"}
    for address in (guest["address"], guest["shadow"], guest["gateway"], *LOOPBACK):
        sniffer = neighbour.sniff("lan0", both_ways=True)
        assert neighbour.reaches(address, wait=QUIET) == set(), address
        assert sniffer.frames(), f"nothing was sent to {address}"
        sniffer.close()


def assert_all_is_well(machine: Booted, guest: dict[str, Any]) -> None:
    """Check new connections in every direction there is."""
    assert asks(machine, guest["address"])
    assert asks(machine, guest["hostname"])
    assert asks(machine, INTERNET, *WEB)
    assert asks(machine, INTERNET)


@pytest.mark.parametrize("tests", ["test_datapath.py", "test_attacks.py"])
def test_what_namespaces_show_holds_on_debians_kernel(tests: str, machine: Booted) -> None:
    assert "Debian" in machine.run("uname", "-v")
    done = machine.execute("/root/vmnet/bin/test", f"tests/kernel/{tests}", timeout=3000)
    assert done.code == 0, done.out[-8000:] + done.err
    assert "skipped" not in done.out


def test_the_main_job_and_a_move(machine: Booted, lab: Lab) -> None:
    home, hotel = machine.lans
    vmnet(machine, "--yes", "create", "myvm")
    vmnet(machine, "create", "web", "--netns", "web")
    web = json.loads(vmnet(machine, "show", "web", "--json"))
    assert differs(machine) == ""
    serve(machine)
    serve(machine, *WEB)
    assert_all_is_well(machine, web)
    assert lab.internet.tcp(uplink_address(machine)) == b"hello"
    machine.run("sh", "-c", _ANSWERED)
    assert_nobody_gets_in(machine, home, web)

    for what in (
        "sysctl --system",
        "systemctl restart systemd-sysctl",
        "systemctl restart systemd-udevd; udevadm trigger --action=add --subsystem-match=net",
        "systemctl restart NetworkManager; nm-online -q -t 60",
        "nmcli connection reload; nmcli general reload",
    ):
        machine.run("sh", "-c", what)
        assert differs(machine) == "", what
    assert_all_is_well(machine, web)

    machine.run(
        "systemd-run", "--unit=talk", "--property=StandardOutput=file:/run/said", "python3", "-c", _TALK, web["address"]
    )
    for card, neighbour in ((1, hotel), (0, home)):
        machine.unplug(1 - card)
        machine.await_("ip", "route", "get", INTERNET, until=lambda done: done.code != 0)
        assert asks(machine, web["address"]), "a phase with no LAN"
        machine.plug(card)
        machine.await_("ip", "route", "get", INTERNET, until=lambda done: done.code == 0)
        assert_all_is_well(machine, web)
        assert_nobody_gets_in(machine, neighbour, web)
        assert differs(machine) == ""
        said = len(machine.run("cat", "/run/said"))
        machine.await_("cat", "/run/said", until=lambda done: len(done.out) > said)  # noqa: B023
    assert machine.run("systemctl", "is-active", "talk").strip() == "active"


def test_a_reboot_with_the_service_and_no_trace_after_it(machine: Booted) -> None:
    before = traces(machine)
    vmnet(machine, "--yes", "create", "myvm")
    vmnet(machine, "create", "web", "--netns", "web")
    web = json.loads(vmnet(machine, "show", "web", "--json"))
    vmnet(machine, "hooks", "install")
    machine.reboot()

    assert machine.run("systemctl", "--failed", "--no-legend", "--plain") == ""
    assert {info["name"]: info["state"] for info in json.loads(vmnet(machine, "list", "--json"))} == dict.fromkeys(
        ("myvm", "web"), "up"
    )
    assert since(machine, "vmnet.service") <= since(machine, "network.target")
    assert differs(machine) == ""
    serve(machine)
    serve(machine, *WEB)
    assert_all_is_well(machine, web)
    assert_nobody_gets_in(machine, machine.lans[0], web)
    managed = machine.run("nmcli", "--terse", "--fields", "device,state", "device").split()
    assert {"lo:unmanaged", "vmn-web:unmanaged", "vmn-myvm:unmanaged"} <= set(managed)
    status = machine.run("sh", "-c", "cat /proc/$(systemctl show -P MainPID vmnet-watch)/status")
    assert {"NoNewPrivs:\t1", "Seccomp:\t2"} <= set(status.splitlines())
    machine.run("systemd-analyze", "security", "--threshold=55", "vmnet-watch.service")
    machine.run("systemd-analyze", "security", "--threshold=55", "vmnet-dnsmasq.service")
    # The first command of this boot has started it, and it has no mounts of its own.
    assert (
        machine.run("systemctl", "is-active", "vmnet-server.socket", "vmnet-server.service").split() == ["active"] * 2
    )
    places = machine.run("sh", "-c", "readlink /proc/1/ns/mnt /proc/$(systemctl show -P MainPID vmnet-server)/ns/mnt")
    assert len(set(places.split())) == 1
    assert machine.run("stat", "-c", "%a %U", "/run/vmnet/server.sock") == "600 root\n"
    machine.run("systemd-analyze", "security", "--threshold=55", "vmnet-server.service")
    machine.run("sh", "-c", "systemd-analyze verify /etc/systemd/system/vmnet*.service")

    for damage, healed in _DAMAGES.items():
        machine.run("sh", "-c", damage)
        machine.await_("sh", "-c", healed, until=lambda done: done.code == 0)
        assert differs(machine) == "", damage
    # A clock that jumps is what a resume looks like, and the kernel tells of both in the same way.
    machine.run("date", "-s", "5 minutes")
    woken = ("journalctl", "-b", "-q", "-u", "vmnet-watch", "--grep", "looking anew cause=resume")
    machine.await_(*woken, until=lambda done: done.code == 0)
    assert_nobody_gets_in(machine, machine.lans[0], web)
    assert (
        machine.run("journalctl", "-b", "-q", "-p", "warning", "-u", "vmnet", "-u", "vmnet-watch", "-u", "vmnet-server")
        == ""
    )

    vmnet(machine, "hooks", "uninstall")
    assert machine.execute("test", "-e", "/run/vmnet/server.sock").code == 1
    vmnet(machine, "restore", "--purge")
    assert vmnet(machine, "list", "--json").strip() == "[]"
    assert machine.execute("systemctl", "is-active", "vmnet-dnsmasq").out.strip() == "inactive"
    assert machine.execute("pgrep", "-x", "dnsmasq").out == ""
    after = traces(machine)
    for what, was in before.items():
        assert after[what] == was, what
