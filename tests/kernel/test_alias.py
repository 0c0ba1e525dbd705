"""Guests that are an address of the host itself, on its lo."""

import json
import os
import socket
from contextlib import suppress
from threading import Thread

import pytest

from tests.kernel.machine import wait_until
from tests.kernel.net import FORMS, Lab, Laptop
from tests.kernel.watching import NEVER, Watching

ALIAS = ("--kind", "alias")
ADDRESS = "127.1.0.2"


def on_lo(laptop: Laptop) -> list[str]:
    """Return the IPv4 addresses of lo."""
    [lo] = json.loads(laptop.run("ip", "-j", "-4", "addr", "show", "lo"))
    return [f"{one['local']}/{one['prefixlen']}" for one in lo["addr_info"]]


def test_an_alias_is_an_address_of_the_host(laptop: Laptop) -> None:
    [made] = laptop.vmnet("create", "web", *ALIAS, "--json").json
    assert (made["kind"], made["address"], made["device"], made["state"]) == ("alias", ADDRESS, "lo", "up")
    nothing = {key for key, value in made.items() if value is None}
    assert nothing == {"mode", "shadow", "guest_address", "guest_gateway", "guest_prefix", "mac", "netns"}
    assert on_lo(laptop) == ["127.0.0.1/16", f"{ADDRESS}/32"]
    with laptop.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((ADDRESS, 8000))
        listener.listen()
        with laptop.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(5)
            client.connect((ADDRESS, 8000))
    assert f"{ADDRESS}\tweb.vmnet.internal" in laptop.hosts_file.read_text()
    assert laptop.vmnet("create", "web", *ALIAS).code == 0
    laptop.vmnet("delete", "web")
    assert on_lo(laptop) == ["127.0.0.1/16"]


def test_an_alias_goes_and_comes_with_its_record(laptop: Laptop) -> None:
    before = laptop.snapshot()
    laptop.vmnet("create", "web", *ALIAS)
    for down, up in (("down web", "up web"), ("restore", "up")):
        laptop.vmnet(*down.split())
        assert f"{ADDRESS}/32" not in on_lo(laptop)
        assert laptop.vmnet("list", "--json").json[0]["state"] == "down"
        laptop.vmnet(*up.split())
        assert f"{ADDRESS}/32" in on_lo(laptop)
    laptop.vmnet("restore", "--purge")
    after = laptop.snapshot()
    assert {key: (before[key], value) for key, value in after.items() if value != before[key]} == {}


@pytest.mark.parametrize("deed", [f"addr del {ADDRESS}/32 dev lo", f"addr add {ADDRESS}/8 dev lo"])
def test_an_alias_that_somebody_changes_is_put_right(laptop: Laptop, deed: str) -> None:
    laptop.vmnet("create", "web", *ALIAS)
    laptop.ip(deed)
    assert laptop.vmnet("list", "--json").json[0]["state"] != "up"
    assert laptop.vmnet("plan", check=False).code == 10
    laptop.vmnet("watch", "--once")
    assert on_lo(laptop) == ["127.0.0.1/16", f"{ADDRESS}/32"]
    assert laptop.vmnet("plan").code == 0


@pytest.mark.parametrize("sense", [None, "deaf"])
def test_the_watcher_puts_an_alias_back(laptop: Laptop, sense: str | None) -> None:
    laptop.vmnet("create", "web", *ALIAS)
    with Watching(laptop, sense=sense, interval=0.5 if sense else NEVER) as watcher:
        for deed in (f"addr del {ADDRESS}/32 dev lo", f"addr add {ADDRESS}/8 dev lo"):
            laptop.ip(deed)
            assert wait_until(lambda: on_lo(laptop) == ["127.0.0.1/16", f"{ADDRESS}/32"], 30), watcher.log()


def test_an_alias_is_not_taken_for_somebody_elses(laptop: Laptop) -> None:
    laptop.vmnet("create", "web", *ALIAS)
    for file in (laptop.folder / "run").glob("found*"):
        file.unlink()
    laptop.vmnet("carve")
    laptop.vmnet("up")
    assert laptop.vmnet("list", "--json").json[0]["state"] == "up"


def test_neither_guests_nor_neighbours_get_to_an_alias(lab: Lab) -> None:
    laptop = lab.laptop
    laptop.vmnet("create", "shop", *ALIAS)
    guests = [laptop.guest(form, *FORMS[form]) for form in ("veth-native", "veth-mapped")]
    with laptop.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((ADDRESS, 8000))
        listener.listen()
        listener.settimeout(0.5)
        for machine in (*guests, lab.lan):
            for address in (ADDRESS, ADDRESS.replace("127.", "247.", 1)):
                if machine is lab.lan:
                    machine.ip(f"route replace {address} via 192.168.77.2 table local")
                with machine.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
                    client.settimeout(0.5)
                    with pytest.raises(OSError, match=r"."):
                        client.connect((address, 8000))
        with pytest.raises(TimeoutError):
            listener.accept()
        with laptop.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.connect((ADDRESS, 8000))
        listener.accept()[0].close()


@pytest.mark.parametrize(
    ("options", "word"),
    [("--native", "alias"), ("--mapped", "alias"), ("--mtu 1400", "alias"), ("--mac 02:00:00:00:00:01", "MAC"),
     ("--netns x", "namespace"), ("--queues 2", "queue")],
)  # fmt: skip
def test_what_an_alias_cannot_have_is_refused(laptop: Laptop, options: str, word: str) -> None:
    done = laptop.vmnet("create", "web", *ALIAS, *options.split(), check=False)
    assert done.code == 2
    assert word in done.err
    assert laptop.vmnet("list", "--json").json == []
    assert not os.path.exists(laptop.path("/run/netns/x"))


def test_what_needs_a_device_says_that_an_alias_has_none(laptop: Laptop) -> None:
    laptop.vmnet("create", "web", *ALIAS)
    for words in ("exec web -- true", "show web --qemu", "show web --libvirt", "show web --cloud-init"):
        done = laptop.vmnet(*words.split(), check=False)
        assert done.code == 4, words
        assert "alias" in done.err
    found = laptop.vmnet("run", "job", *ALIAS, "--", "sh", "-c", "echo $VMNET_ADDRESS $VMNET_DEVICE")
    assert found.out == "127.1.0.6 lo\n"


def serve(laptop: Laptop, address: str, port: int) -> socket.socket:
    """Listen there; each connection is sent the port."""
    listener = laptop.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen()

    def answer() -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                client.sendall(b"%d" % port)
                client.close()

    Thread(target=answer, daemon=True).start()
    return listener


def asked(laptop: Laptop, port: int, address: str = ADDRESS) -> bytes | None:
    """Return what is answered at a port, None where nobody listens."""
    with laptop.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(5)
        try:
            client.connect((address, port))
            return client.recv(100)
        except OSError:
            return None


def test_ports_of_an_alias_lead_where_they_are_told_to(laptop: Laptop) -> None:
    laptop.vmnet("create", "web", *ALIAS)
    told = laptop.vmnet("relay", "web", "80:127.0.0.1:8080", "8081", "--json")
    assert [(one["port"], one["target_port"]) for one in told.json] == [(80, 8080), (8081, 8081)]
    assert "no watcher" in told.err
    with serve(laptop, "127.0.0.1", 8080), serve(laptop, "127.0.0.1", 8081):
        assert asked(laptop, 80) is None
        with Watching(laptop) as watcher:
            assert wait_until(lambda: asked(laptop, 80) == b"8080" and asked(laptop, 8081) == b"8081", 30), (
                watcher.log()
            )
            assert laptop.vmnet("relay", "web", "80:127.0.0.1:8080").err == ""
            laptop.vmnet("unrelay", "web", "8081")
            assert wait_until(lambda: asked(laptop, 8081) is None, 30)
            assert asked(laptop, 80) == b"8080"
            laptop.vmnet("down", "web")
            assert wait_until(lambda: asked(laptop, 80) is None, 30)
            laptop.vmnet("up", "web")
            assert wait_until(lambda: asked(laptop, 80) == b"8080", 30), watcher.log()
        with Watching(laptop) as watcher:
            assert wait_until(lambda: asked(laptop, 80) == b"8080", 30), watcher.log()
            laptop.vmnet("delete", "web")
            assert wait_until(lambda: asked(laptop, 80) is None, 30)
        laptop.vmnet("create", "web", *ALIAS)
        assert laptop.vmnet("show", "web", "--json").json["relays"] == []


def test_a_relay_that_does_not_work_is_told(laptop: Laptop) -> None:
    laptop.vmnet("create", "web", *ALIAS)
    laptop.vmnet("relay", "web", "80:127.0.0.1:8080")
    with serve(laptop, ADDRESS, 80), Watching(laptop, interval=0.2) as watcher:
        assert wait_until(lambda: f"{ADDRESS}:80" in laptop.vmnet("watch", "--status").out, 30), watcher.log()


def test_relays_are_recorded_as_they_were_asked_for(laptop: Laptop) -> None:
    laptop.vmnet("create", "web", *ALIAS)
    laptop.vmnet("create", "other", "--kind", "veth")
    dry = laptop.vmnet("relay", "web", "80:db.example:8080", "--dry-run", check=False)
    assert (dry.code, dry.out) == (10, "+ relay web 80 to db.example:8080 (tcp)\n")
    laptop.vmnet("relay", "web", "80:db.example:8080", "53/udp", "80:[::1]:9/udp")
    relays = ["53:127.0.0.1:53/udp", "80:db.example:8080/tcp", "80:[::1]:9/udp"]
    assert laptop.vmnet("show", "web", "--json").json["relays"] == relays
    assert f"  {', '.join(relays)}\n" in laptop.vmnet("show", "web").out
    for words, code, said in (
        ("relay web 80:db.example:8081", 4, "vmnet unrelay web 80/tcp"),
        ("relay other 80", 4, "other is a veth"),
        ("relay nobody 80", 3, "nobody"),
        ("relay web 0", 2, "is no relay"),
        ("unrelay web 81", 3, "port 81/tcp of web leads nowhere"),
    ):
        done = laptop.vmnet(*words.split(), check=False)
        assert (done.code, said in done.err) == (code, True), done
    assert laptop.vmnet("show", "web", "--json").json["relays"] == relays
    laptop.vmnet("unrelay", "web", "80", "53/udp")
    assert laptop.vmnet("show", "web", "--json").json["relays"] == relays[2:]
