"""Domains of a real libvirtd (`libvirtd.py`) on vmnet, through all that can happen to them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.libvirtd import Domain, Libvirtd, domain_xml, ethernet, on_network
from tests.kernel.machine import Machine, wait_until
from tests.kernel.net import Lab, Laptop, Result
from tests.kernel.test_hooks import hooks, program  # noqa: F401 -- fixtures
from tests.kernel.vm import LIMIT, VM, boot
from vmnet.model import LIBVIRT_BRIDGE

pytestmark = pytest.mark.root

MAC = "52:54:00:7f:01:16"
UUID = "c7a5fdbd-cdaf-9455-926a-d65c16db1809"
Interface = Callable[[str, str], str]
RECORDER = '#!/bin/sh\necho "${0##*/hooks/}" "$@" >>/run/calls\nexec cat >/dev/null\n'


@pytest.fixture
def libvirt(laptop: Laptop) -> Iterator[Libvirtd]:
    with Libvirtd(laptop) as running:
        yield running


@pytest.fixture
def hooked(libvirt: Libvirtd, hooks: Callable[..., Result]) -> Libvirtd:  # noqa: F811
    """libvirt with vmnet's hooks, installed while it runs."""
    hooks("install", "libvirt")
    return libvirt


@pytest.fixture(params=["device", "network"])
def interface(request: pytest.FixtureRequest, hooked: Libvirtd) -> Interface:
    """Both ways in which a domain asks for vmnet: by a device's name, and by the network `vmnet`."""
    if request.param == "device":
        return ethernet
    return lambda device, mac: on_network(mac)


def record(libvirt: Libvirtd, *names: str) -> Path:
    """Install scripts of others, which record how they are called; return the record."""
    for name in names:
        script = libvirt.hooks / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(RECORDER)
        script.chmod(0o755)
    libvirt.reload()
    calls = libvirt.laptop.path("/run/calls")
    calls.touch()
    return calls


def devices(laptop: Laptop) -> set[str]:
    """Return the devices of guests."""
    return {link for link in laptop.links() if link.startswith("vmn-") and link != LIBVIRT_BRIDGE}


def shown(laptop: Laptop, name: str) -> dict[str, Any]:
    found: dict[str, Any] = laptop.vmnet("show", name, "--json").json
    return found


def assert_at_home(domain: Domain) -> None:
    """Check that a running domain has the address and the name of its record, and that both work."""
    laptop, info = domain.libvirt.laptop, shown(domain.libvirt.laptop, domain.guest)
    assert (info["state"], info["address"]) == ("up", domain.address)
    assert info["device"] in devices(laptop)
    assert domain.http() == f"{domain.guest} {info['shadow']}"
    assert laptop.run("getent", "ahostsv4", info["hostname"]).split()[0] == domain.address
    # By its serial port: the VM's own way out.
    assert domain.run(f"ping -c 1 -W 5 {INTERNET} >/dev/null && echo there") == "there"


def assert_gone(domain: Domain) -> None:
    """Check that a domain that has ended left nothing but its record, and that in its place."""
    domain.await_state("shut off")
    laptop = domain.libvirt.laptop
    info = shown(laptop, domain.guest)
    assert (info["state"], info["address"]) == ("down", domain.address)
    assert info["device"] not in laptop.links()


INTERNET = "198.51.100.2"


def test_a_domain_on_a_tap_that_was_created_before_and_no_hooks(laptop: Laptop, libvirt: Libvirtd) -> None:
    [made] = laptop.vmnet("create", "web", "--json").json
    web = Domain(libvirt, "web", ethernet(made["device"], made["mac"]))
    for _ in range(2):
        web.start()
        assert_at_home(web)
        libvirt.virsh("destroy", "web")
    assert web.state() == "shut off"
    assert shown(laptop, "web")["state"] == "up"


def test_hooks_of_anybody_are_called(laptop: Laptop, libvirt: Libvirtd) -> None:
    [made] = laptop.vmnet("create", "web", "--json").json
    calls = record(libvirt, "qemu.d/theirs", "network.d/theirs")
    web = Domain(libvirt, "web", ethernet(made["device"], made["mac"]))
    web.launch()
    libvirt.virsh("destroy", "web")
    libvirt.virsh("net-start", "default")
    libvirt.virsh("net-destroy", "default")
    assert calls.read_text().splitlines() == [
        *(f"qemu.d/theirs web {step} begin -" for step in ("prepare", "start", "started")),
        *(f"qemu.d/theirs web {step} end -" for step in ("stopped", "release")),
        *(f"network.d/theirs default {step} begin -" for step in ("start", "started")),
        "network.d/theirs default stopped end -",
    ]


ENDS: dict[str, Callable[[Domain], object]] = {
    "poweroff": lambda domain: domain.send("poweroff -f\n"),
    "destroy": lambda domain: domain.libvirt.virsh("destroy", domain.name),
    "killed": lambda domain: domain.libvirt.laptop.run("kill", "-KILL", str(domain.pid)),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_domain_has_its_address_each_time_it_starts(
    laptop: Laptop,
    internet: Machine,
    hooked: Libvirtd,
    end: Callable[[Domain], object],
    interface: Interface,
) -> None:
    web = Domain(hooked, "web", interface("vmn-web", MAC), uuid=UUID)
    web.start()
    info, address = shown(laptop, "web"), web.address
    assert (info["name"], info["device"], info["mac"]) == ("web", "vmn-web", MAC)
    assert_at_home(web)
    end(web)
    assert_gone(web)
    laptop.vmnet("watch", "--once")
    assert_gone(web)
    laptop.vmnet("create", "other")  # the next free block is not web's
    web.start()
    assert web.address == address
    assert_at_home(web)


def test_a_domain_lives_through_what_hooks_do_not_hear_of(
    laptop: Laptop, internet: Machine, hooked: Libvirtd, interface: Interface
) -> None:
    web = Domain(hooked, "web", interface("vmn-web", MAC))
    web.start()
    index = laptop.run("cat", "/sys/class/net/vmn-web/ifindex")
    hooked.virsh("suspend", "web")
    hooked.virsh("resume", "web")
    assert_at_home(web)
    web.send("reboot -f\n")
    web.await_ready()
    assert_at_home(web)
    hooked.virsh("reset", "web")
    web.await_ready()
    assert_at_home(web)
    assert laptop.run("cat", "/sys/class/net/vmn-web/ifindex") == index


def test_a_domain_runs_on_when_libvirtd_starts_anew(
    laptop: Laptop, internet: Machine, hooked: Libvirtd, interface: Interface
) -> None:
    web = Domain(hooked, "web", interface("vmn-web", MAC))
    web.start()
    pid = web.pid
    calls = record(hooked, "qemu.d/theirs")
    for damage in ("", "ip link set vmn-web down", "nft delete table ip vmnet"):
        hooked.stop()
        if damage:
            laptop.run(*damage.split())
        else:
            assert web.http()
        hooked.start()
        assert wait_until(lambda: "qemu.d/theirs web reconnect begin -" in calls.read_text(), LIMIT)
        calls.write_text("")
        assert (web.pid, web.state()) == (pid, "running")
        assert wait_until(lambda: shown(laptop, "web")["state"] == "up", LIMIT), damage
        assert_at_home(web)


def break_settings(laptop: Laptop) -> str:
    laptop.path("/etc/vmnet").mkdir(exist_ok=True)
    laptop.path("/etc/vmnet/config.toml").write_text("nonsense")
    return "config.toml"


def break_records(laptop: Laptop) -> str:
    for path in laptop.path("/var/lib/vmnet").iterdir():
        if path.is_file():
            path.write_text("nonsense")
    return "vmnet"


def break_program(laptop: Laptop) -> str:
    (laptop.folder / "a 100% place/bin/python").unlink()
    return "python"


@pytest.mark.parametrize("damage", [break_settings, break_records, break_program])
def test_a_running_domain_outlives_a_vmnet_that_cannot_work(
    laptop: Laptop,
    hooked: Libvirtd,
    damage: Callable[[Laptop], str],
    interface: Interface,
) -> None:
    web = Domain(hooked, "web", interface("vmn-web", MAC))
    hooked.virsh("start", "--paused", "web")
    pid = web.pid
    calls = record(hooked, "qemu.d/theirs")
    word = damage(laptop)
    hooked.stop()
    hooked.start()
    assert wait_until(lambda: "qemu.d/theirs web reconnect begin -" in calls.read_text(), LIMIT)
    # What libvirt does with a domain whose hook has failed comes after the last hook.
    assert not wait_until(lambda: web.state() != "paused", 1)
    assert web.pid == pid
    hooked.virsh("destroy", "web")
    done = hooked.virsh("start", "web", check=False)
    assert done.code != 0
    assert word in done.err.partition("Hook script execution failed")[2]


@pytest.mark.parametrize("form", ["managedsave", "save"])
def test_a_domain_that_was_saved_goes_on_where_it_was(
    laptop: Laptop,
    internet: Machine,
    hooked: Libvirtd,
    form: str,
    interface: Interface,
) -> None:
    web = Domain(hooked, "web", interface("vmn-web", MAC))
    web.start()
    address = web.address
    web.run("echo before >/tmp/mark")
    file = "/var/lib/libvirt/qemu/web.saved"
    hooked.virsh(form, "web", *([file] if form == "save" else []))
    assert_gone(web)
    laptop.vmnet("create", "other")
    hooked.virsh(*(["restore", file] if form == "save" else ["start", "web"]))
    web.connect()
    assert web.address == address
    assert web.run("cat /tmp/mark") == "before"
    assert_at_home(web)


def test_a_domain_that_migrates_has_its_record_at_both_ends(
    lab: Lab,
    hooked: Libvirtd,
    program: Path,  # noqa: F811
    tmp_path: Path,
    interface: Interface,
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    with Lab(folder) as other, Libvirtd(other.laptop) as there:
        other.laptop.run(str(program), "-m", "vmnet", "hooks", "install", "libvirt")
        lab.wire(lab.laptop, "cable0", other.laptop, "cable0")
        lab.laptop.ip("addr add 10.9.0.1/24 dev cable0")
        other.laptop.ip("addr add 10.9.0.2/24 dev cable0")
        web = Domain(hooked, "web", interface("vmn-web", MAC), uuid=UUID)
        moved = Domain(there, "web", interface("vmn-web", MAC), uuid=UUID)
        web.start()
        web.run("echo before >/tmp/mark")
        lab.laptop.vmnet("create", "other")
        target = ("qemu+tcp://10.9.0.2/system", "tcp://10.9.0.2:49152")
        hooked.virsh("migrate", "--live", "web", *target)
        assert_gone(web)
        moved.connect()
        assert (moved.state(), moved.address) == ("running", web.address)
        assert moved.run("cat /tmp/mark") == "before"
        assert_at_home(moved)
        # Where it cannot be received it runs on.
        moved.libvirt.virsh("destroy", "web")
        web.start()
        other.laptop.ip("link add vmn-web type bridge")
        assert hooked.virsh("migrate", "--live", "web", *target, check=False).code != 0
        assert web.state() == "running"
        assert_at_home(web)


def test_a_domain_that_is_defined_anew_has_the_same_record(
    laptop: Laptop, hooked: Libvirtd, interface: Interface
) -> None:
    def start() -> Domain:
        web = Domain(hooked, "web", interface("vmn-web", MAC), uuid=UUID)
        web.launch()
        hooked.virsh("destroy", "web")
        hooked.virsh("undefine", "web")
        return web

    first = start()
    assert shown(laptop, "web")["state"] == "down"
    assert start().address == first.address
    assert len(laptop.vmnet("list", "--json").json) == 1


def test_a_domain_that_is_renamed_has_the_same_record(
    laptop: Laptop, internet: Machine, hooked: Libvirtd, interface: Interface
) -> None:
    web = Domain(hooked, "web", interface("vmn-web", MAC), uuid=UUID)
    web.start()
    hooked.virsh("destroy", "web")
    hooked.virsh("domrename", "web", "shop")
    shop = Domain(hooked, "shop", interface("vmn-web", MAC), uuid=UUID, guest="web")
    shop.start()
    assert shop.address == web.address
    assert_at_home(shop)
    assert [one["name"] for one in laptop.vmnet("list", "--json").json] == ["web"]


@pytest.mark.parametrize("is_down", [False, True], ids=["up", "down"])
def test_a_guest_that_was_created_before_its_domain(
    laptop: Laptop,
    internet: Machine,
    hooked: Libvirtd,
    is_down: bool,
    interface: Interface,
) -> None:
    [made] = laptop.vmnet("create", "web", "--address", "127.7.7.2", "--json").json
    if is_down:
        laptop.vmnet("down", "web")
    web = Domain(hooked, "web", interface("vmn-web", made["mac"]))
    for _ in range(2):
        web.start()
        assert web.address == "127.7.7.2"
        assert_at_home(web)
        hooked.virsh("destroy", "web")
        assert_gone(web)
    assert len(laptop.vmnet("list", "--json").json) == 1


@pytest.mark.parametrize("kind", ["tap", "bridge"])
def test_a_device_of_somebody_else_is_left_alone_and_named(laptop: Laptop, hooked: Libvirtd, kind: str) -> None:
    make = "tuntap add vmn-web mode tap" if kind == "tap" else "link add vmn-web type bridge"
    laptop.ip(make, "link set vmn-web address 02:00:00:00:00:99 alias theirs up", "addr add 10.9.9.9/24 dev vmn-web")
    before = laptop.run("ip", "addr", "show", "vmn-web")
    Domain(hooked, "web", ethernet("vmn-web", MAC))
    done = hooked.virsh("start", "web", check=False)
    assert done.code != 0
    assert "vmn-web" in done.err.partition("Hook script execution failed")[2]
    assert laptop.run("ip", "addr", "show", "vmn-web") == before
    laptop.run("ip", "link", "del", "vmn-web")
    hooked.virsh("start", "web")


def test_a_domain_that_wants_the_device_of_another_does_not_start(laptop: Laptop, hooked: Libvirtd) -> None:
    Domain(hooked, "web", ethernet("vmn-web", MAC))
    Domain(hooked, "thief", ethernet("vmn-web", MAC))
    hooked.virsh("start", "--paused", "web")
    before = shown(laptop, "web")
    done = hooked.virsh("start", "--paused", "thief", check=False)
    assert done.code != 0
    assert "vmn-web" in done.err.partition("Hook script execution failed")[2]
    assert shown(laptop, "web") == before
    hooked.virsh("destroy", "web")
    hooked.virsh("start", "--paused", "thief")
    assert shown(laptop, "web") == before


def test_a_domain_that_wants_the_device_of_a_vm_that_runs_without_libvirt(
    laptop: Laptop, internet: Machine, hooked: Libvirtd
) -> None:
    [vm] = boot(laptop, "web")
    web = Domain(hooked, "web", ethernet("vmn-web", MAC))

    def assert_vm_is_left_alone() -> None:
        assert hooked.virsh("start", "web", check=False).code != 0
        assert shown(laptop, "web")["state"] == "up"
        assert vm.http() == f"web {vm.shadow}"

    assert_vm_is_left_alone()
    vm.kill()
    web.launch()  # from now on the record is the domain's
    hooked.virsh("destroy", "web")
    laptop.vmnet("up", "web")
    vm = VM(laptop, shown(laptop, "web"))
    vm.await_ready()
    assert_vm_is_left_alone()


def test_a_guest_that_is_deleted_while_its_domain_runs(laptop: Laptop, hooked: Libvirtd) -> None:
    Domain(hooked, "web", ethernet("vmn-web", MAC))
    hooked.virsh("start", "--paused", "web")
    laptop.vmnet("delete", "web")
    hooked.virsh("destroy", "web")
    assert laptop.vmnet("list", "--json").json == []
    hooked.virsh("start", "--paused", "web")
    assert shown(laptop, "web")["state"] == "up"


def test_a_domain_starts_on_a_host_that_has_lost_everything_but_its_records(
    laptop: Laptop,
    internet: Machine,
    hooked: Libvirtd,
    interface: Interface,
) -> None:
    web = Domain(hooked, "web", interface("vmn-web", MAC))
    web.start()
    address = web.address
    hooked.virsh("destroy", "web")
    laptop.vmnet("create", "other")
    laptop.vmnet("restore")
    web.start()
    assert web.address == address
    assert_at_home(web)


def test_a_domain_with_two_interfaces_has_two_records(laptop: Laptop, hooked: Libvirtd, interface: Interface) -> None:
    second = "52:54:00:7f:01:17"
    web = Domain(hooked, "web", interface("vmn-web", MAC) + interface("vmn-web-2", second))
    web.launch()
    found = {one["name"]: one["mac"] for one in laptop.vmnet("list", "--json").json if one["state"] == "up"}
    assert found == {"web": MAC, "web-2": second}
    hooked.virsh("destroy", "web")
    assert devices(laptop) == set()


HOSTILE = {
    "quotes": "a'b\"c",
    "shell": "$(touch owned);`touch owned`;touch owned;",
    "option": "--help",
    "entity": "&lt;&amp;x;",
    "spaces": " two words ",
    "letters": "Größe_1.5",
    "long": "x" * 200,
    "another": "web2",
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_domain_of_any_name_has_the_record_of_its_device(laptop: Laptop, hooked: Libvirtd, name: str) -> None:
    web = Domain(hooked, name, ethernet("vmn-web", MAC), guest="web", uuid=UUID)
    hooked.virsh("start", "--paused", UUID)
    info = shown(laptop, "web")
    assert (info["state"], info["mac"]) == ("up", MAC)
    assert not laptop.path("/owned").exists()
    hooked.virsh("destroy", UUID)
    assert wait_until(lambda: devices(laptop) == set(), LIMIT)
    assert [one["name"] for one in laptop.vmnet("list", "--json").json] == ["web"]
    assert web.uuid == UUID


def test_domains_that_are_not_ours_hear_nothing_of_vmnet(laptop: Laptop, hooked: Libvirtd) -> None:
    laptop.ip("tuntap add theirs0 mode tap", "link set theirs0 up")
    before = laptop.snapshot()
    Domain(hooked, "theirs", ethernet("theirs0", MAC))
    hooked.virsh("start", "--paused", "theirs")
    hooked.virsh("destroy", "theirs")
    laptop.ip("link del theirs0", "tuntap add theirs0 mode tap", "link set theirs0 up")
    after = laptop.snapshot()
    for text in before, after:
        for key in [key for key in text if "link" in key or "addr" in key or "route" in key]:
            text.pop(key)
    assert after == before
    assert laptop.vmnet("list", "--json").json == []


def test_hooks_of_others_go_on_and_decide_for_themselves(laptop: Laptop, hooked: Libvirtd) -> None:
    names = ("qemu", "qemu.d/00-first", "qemu.d/zz-last", "network", "network.d/theirs")
    calls = record(hooked, *names)
    web = Domain(hooked, "web", ethernet("vmn-web", MAC))
    web.launch()
    hooked.virsh("destroy", "web")
    steps = ["prepare begin", "start begin", "started begin", "stopped end", "release end"]
    assert calls.read_text().splitlines() == [f"{name} web {step} -" for step in steps for name in names[:3]]
    for step in ("prepare", "start", "started"):  # one of theirs refuses: no guest, and no device of it
        (hooked.hooks / "qemu.d/zz-last").write_text(f'#!/bin/sh\necho not today >&2\n[ "$2" != {step} ]\n')
        done = hooked.virsh("start", "web", check=False)
        assert "not today" in done.err
        assert_gone(web)


def test_nothing_is_said_on_stdout(laptop: Laptop, hooked: Libvirtd) -> None:
    """What a hook of libvirt's prints replaces the XML of a guest that is restored or migrated."""
    xml = domain_xml("web", ethernet("vmn-web", MAC), uuid=UUID)
    for words in ("restore begin", "migrate begin", "prepare begin", "start begin", "reconnect begin", "release end"):
        done = laptop.execute("/etc/libvirt/hooks/qemu.d/vmnet", "web", *words.split(), "-", stdin=xml)
        assert done == Result(0, "", ""), words
    assert devices(laptop) == set()


@pytest.mark.parametrize("count", [pytest.param(10, id="ten"), pytest.param(100, id="hundred", marks=pytest.mark.long)])
def test_many_start_at_once(
    laptop: Laptop, internet: Machine, hooked: Libvirtd, count: int, interface: Interface
) -> None:
    domains = [
        Domain(hooked, f"many{number}", interface(f"vmn-many{number}", f"52:54:00:7f:02:{number:02x}"))
        for number in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda domain: hooked.virsh("start", "--paused", domain.name), domains))
    assert devices(laptop) == {f"vmn-{domain.name}" for domain in domains}
    listed = laptop.vmnet("list", "--json").json
    assert {one["state"] for one in listed} == {"up"}
    assert len({one["address"] for one in listed}) == count
    for domain in (domains[0], domains[-1]):
        hooked.virsh("resume", domain.name)
        domain.connect()
        domain.await_ready()
        assert_at_home(domain)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(ENDS["destroy"], domains))
    assert devices(laptop) == set()
    assert {one["name"] for one in laptop.vmnet("list", "--json").json} == {domain.name for domain in domains}
