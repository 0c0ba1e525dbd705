"""A VM boots, unmodified: it asks by DHCP for what it needs, and has it, whatever it or the laptop goes through.

The VMs are real (`vm.py`); their kernel, their DHCP client and their resolver know nothing of vmnet.
"""

import shlex
import socket
import subprocess
from functools import partial
from typing import Any

import pytest

from tests.kernel import frames
from tests.kernel.machine import ECHO_PORT, QUIET, Machine, Sniffer, wait_until
from tests.kernel.net import FORMS, Lab, Laptop, need_own_etc
from tests.kernel.vm import LIMIT, VM, boot, vm_files

ALL = {"tcp", "udp", "ping"}
INTERNET = "198.51.100.2"
DOMAIN = "vmnet.internal"
MACS = {"a": "52:54:00:12:34:56", "b": "52:54:00:00:00:0b", "c": "02:00:00:00:00:0c"}
"""The first is what every qemu gives that is not told another."""

TOKEN = "from-a-wrong-address"


@pytest.fixture
def online(lab: Lab) -> Lab:
    """The lab with a web server on the internet, internet.example, which the resolver of the LAN knows."""
    need_own_etc()
    lab.internet.serve(80)
    resolve_by(lab, lab.lan)
    return lab


def resolve_by(lab: Lab, router: Machine) -> None:
    """Start a name server on a LAN's router, and have the laptop use it, as by the LAN's DHCP."""
    with router.entered():
        server = subprocess.Popen(
            [
                *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts", "--no-resolv"),
                *("--user=root", "--pid-file=", "--bind-interfaces", f"--listen-address={router.address}"),
                *(f"--address=/internet.example/{INTERNET}", "--local=/internet.example/"),
            ],
            stderr=subprocess.DEVNULL,
        )
    lab.at_exit(server.wait)
    lab.at_exit(server.terminate)
    lab.laptop.path("/etc/resolv.conf").write_text(f"nameserver {router.address}\n")


def fetch(vm: VM, url: str, seconds: int = 5) -> str:
    """Have the VM fetch a page; "" when it cannot within so many seconds."""
    return vm.run(f"timeout {seconds} wget -q -O - {shlex.quote(url)} 2>/dev/null || true")


def assert_at_home(vm: VM) -> None:
    """Check that a VM has what its record says, and that the laptop reaches it."""
    assert vm.says("lease"), f"{vm.name} has no lease"
    lease = vm.says("lease")[-1]
    assert {key: lease[key] for key in ("ip", "router", "dns", "hostname", "domain")} == {
        "ip": f"{vm.shadow}/30",
        "router": vm.guest_gateway,
        "dns": vm.guest_gateway,
        "hostname": vm.name,
        "domain": DOMAIN,
    }
    assert vm.run("cat /sys/class/net/eth0/mtu") == str(vm.info["mtu"])
    assert vm.http() == f"{vm.name} {vm.shadow}"
    assert vm.http("/cgi-bin/peer") == f"{vm.name} sees [::ffff:{vm.guest_gateway}]"


def test_vms_boot_and_meet_and_move(online: Lab) -> None:
    laptop = online.laptop
    vms = one, two = boot(laptop, "one", "two")
    uplink = "192.168.77.2"

    def assert_all_is_well() -> None:
        for vm, other in ((one, two), (two, one)):
            assert_at_home(vm)
            for name in (other.name, f"{other.name}.{DOMAIN}"):
                assert fetch(vm, f"http://{name}/cgi-bin/peer") == f"{other.name} sees [::ffff:{vm.shadow}]"
            assert fetch(vm, f"http://{INTERNET}/") == uplink
            # Where the LAN's resolver has just changed, a name may take a few seconds.
            assert wait_until(lambda: fetch(vm, "http://internet.example/", 2) == uplink, LIMIT)  # noqa: B023

    assert_all_is_well()
    talk = laptop.socket(socket.AF_INET, socket.SOCK_STREAM)
    talk.settimeout(LIMIT)
    talk.connect((one.address, ECHO_PORT))
    laptop.unplug("wlan0")
    for vm, other in ((one, two), (two, one)):
        assert_at_home(vm)
        assert fetch(vm, f"http://{other.name}/cgi-bin/peer") == f"{other.name} sees [::ffff:{vm.shadow}]"
        assert fetch(vm, f"http://{INTERNET}/") == ""
    resolve_by(online, online.plug("wlan1", "10.9.0.0/24"))
    uplink = "10.9.0.2"
    assert_all_is_well()
    talk.sendall(b"still here")
    assert talk.recv(100) == b"still here"
    assert [len(vm.says("boot")) for vm in vms] == [1, 1]


def test_a_vm_reboots_and_is_stopped_for_a_while(laptop: Laptop) -> None:
    [vm] = boot(laptop, "one", options=("--mtu", "1400"))
    assert_at_home(vm)

    vm.reboot()
    assert len(vm.says("lease")) >= 2
    assert_at_home(vm)

    connection = laptop.socket(socket.AF_INET, socket.SOCK_STREAM)
    connection.settimeout(LIMIT)
    connection.connect((vm.address, ECHO_PORT))
    vm.pause()
    connection.sendall(b"hello")
    with pytest.raises(TimeoutError):
        laptop.tcp(vm.address, wait=QUIET)
    vm.resume()
    assert connection.recv(100) == b"hello"
    assert laptop.tcp(vm.address, wait=LIMIT) == b"hello"

    # What a client does at half of its lease, and when it has given it back.
    for event, ask in (("renew", "kill -USR1 $client"), ("bound", "kill -USR2 $client; kill -USR1 $client")):
        leases = len(vm.says("lease"))
        vm.run(f"client=$(cat /run/udhcpc.pid); {ask}")
        assert vm.await_says("lease", leases + 1)["event"] == event
        assert_at_home(vm)


def boot_with(laptop: Laptop, info: dict[str, Any], mac: str) -> VM:
    """Boot a guest's VM with another MAC than the record's, and check that it is at home."""
    vm = VM(laptop, info, mac=mac)
    vm.await_ready()
    assert vm.says("ready")[-1]["mac"] == mac != info["mac"]
    assert_at_home(vm)
    return vm


def test_a_vm_has_its_address_whatever_its_mac(laptop: Laptop) -> None:
    """And at once, though another MAC has the lease, whose VM was killed before it could release it."""
    vm_files()
    [info] = laptop.vmnet("create", "one", "--kind", "tap", "--json").json
    vm = boot_with(laptop, info, MACS["a"])
    vm.kill()
    vm = boot_with(laptop, info, MACS["b"])
    # What follows is a new VM to whoever is outside, without the time that a boot takes.
    for times, mac in enumerate(("c", "a"), start=2):
        vm.run(
            "kill -9 $(cat /run/udhcpc.pid); ip addr flush dev eth0; ip link set eth0 down;"
            f"ip link set eth0 address {MACS[mac]} up; /init dhcp"
        )
        vm.await_says("lease", times)
        assert_at_home(vm)


def nuisance(address: str, victims: set[str]) -> str:
    """Return a script that claims an address, and calls everybody from it, for ever."""
    claims = "".join(f"arping -q {how} -c 1 -w 1 -I eth0 {address} & " for how in ("-A", "-U"))
    # What is asked for by TFTP stands in the first datagram.
    call = f"ping -q -c 1 -W 1 $victim & timeout 1 nc $victim 7 & timeout 1 tftp -g -r {TOKEN} $victim {ECHO_PORT} & "
    return f"while :; do {claims}for victim in {' '.join(victims)}; do {call}done; wait; done"


def has_called(sniffer: Sniffer, address: str, victims: set[str]) -> bool:
    """Take from `victims` those to whom the token has gone from an address; tell whether none is left."""
    for frame in sniffer.frames():
        if frames.kind_of(frame) == 0x0800 and frame[26:30] == socket.inet_aton(address) and TOKEN.encode() in frame:
            victims.discard(socket.inet_ntoa(frame[30:34]))
    return not victims


def test_a_wrong_address_harms_nobody(lab: Lab) -> None:
    """Not those whose address it is: a guest, the host, the LAN's router, localhost. They see nothing of it."""
    laptop, lan = lab.laptop, lab.lan
    good = laptop.guest("good", *FORMS["tap-mapped"])
    native = laptop.guest("native", *FORMS["veth-native"])
    vm_files()
    [info] = laptop.vmnet("create", "bad", "--kind", "tap", "--json").json
    vm = VM(laptop, info, static=f"{good.shadow}/30")
    vm.await_ready()
    laptop.rp_filter(0)
    people = (good, native, laptop, lan, lab.internet)
    services = [machine.serve() for machine in people]

    def assert_nobody_is_disturbed() -> None:
        assert laptop.reaches(good.address) == laptop.reaches(native.address) == ALL
        assert good.reaches(native.shadow) == native.reaches(good.address) == ALL
        assert laptop.reaches(INTERNET) == good.reaches(INTERNET) == ALL
        assert laptop.reaches(lan.address) == lan.reaches("192.168.77.2") == ALL
        assert laptop.reaches("127.0.0.1") == ALL

    assert_nobody_is_disturbed()
    wrong = [
        *(good.shadow, good.guest_gateway, native.shadow, vm.guest_gateway, "247.1.0.200"),
        *(lan.address, "192.168.77.2", INTERNET, "127.0.0.1", good.address, "169.254.1.1"),
    ]
    everybody = {good.shadow, native.shadow, vm.guest_gateway, lan.address, INTERNET, "127.0.0.1"}
    # Without these it would keep for itself what goes to 127/8.
    vm.run("ip addr flush dev lo; echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet")
    for address in wrong:
        victims = everybody - {address}
        vm.run(
            f"ip addr flush dev eth0; ip addr add {address}/30 dev eth0 scope global; ip neigh flush dev eth0;"
            f"ip route replace default dev eth0 src {address};"
            # With the gateway's MAC known, nothing depends on whether somebody answers its ARP.
            f"for victim in {' '.join(victims)}; do arp -i eth0 -s $victim {laptop.mac(vm.device)}; done"
        )
        heard = laptop.sniff(vm.device)
        vm.run(f"setsid sh -c '{nuisance(address, victims)}' >/dev/null 2>&1 & echo $! >/run/nuisance")
        assert wait_until(partial(has_called, heard, address, victims), LIMIT), f"{address} has not called {victims}"
        assert_nobody_is_disturbed()
        vm.run("kill -9 -$(cat /run/nuisance)")
        heard.close()
        assert not [data for service in services for data in service.received if TOKEN.encode() in data], address
    # With its own it is heard, and at once.
    vm.run("ip addr flush dev eth0; /init dhcp")
    vm.await_says("lease")
    assert_at_home(vm)
    vm.run(f"timeout 1 tftp -g -r {TOKEN} {good.shadow} {ECHO_PORT} || true")
    assert wait_until(lambda: any(TOKEN.encode() in data for data in services[0].received), LIMIT)
