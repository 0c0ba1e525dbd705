"""How names look to a command inside of a guest: its resolver is the guest's gateway, whatever the host has."""

import sys

import pytest

from tests.kernel.net import Laptop, need_own_etc
from tests.kernel.warm import Warm

STUB = "/run/systemd/resolve/stub-resolv.conf"
HOSTS_OWN = "nameserver 192.0.2.53\nsearch example.org\n"
GATEWAYS = {"native": "127.1.0.1", "mapped": "247.1.0.1"}
SOCKETS = ("/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket")
ETC = {
    "a file": f"printf '{HOSTS_OWN}' >/etc/resolv.conf",
    "resolved's": f"printf '{HOSTS_OWN}' >{STUB}; ln -s ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf",
    "a link": f"printf '{HOSTS_OWN}' >/run/resolv.conf; ln -s /run/resolv.conf /etc/resolv.conf",
    "a link to nowhere": "ln -s /run/nowhere/resolv.conf /etc/resolv.conf",
    "missing": "true",
}
LISTEN = """
import os, socket, sys
for path in sys.argv[1:]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
"""


@pytest.fixture
def host(laptop: Laptop) -> Laptop:
    """The laptop without a resolv.conf, but with the sockets of systemd-resolved and nscd."""
    need_own_etc()
    laptop.run("rm", "-f", "/etc/resolv.conf")
    laptop.run("python3", "-c", LISTEN, *SOCKETS)
    return laptop


def state(host: Laptop) -> str:
    """Return what a command may have left behind of its own view."""
    names = "ls -lR --time-style=+ /etc/resolv.conf /etc/hosts /run"
    return host.run("sh", "-c", f"cat /proc/mounts; {names}; cat /etc/resolv.conf; :")


@pytest.mark.parametrize("mode", GATEWAYS)
@pytest.mark.parametrize("etc", ETC)
def test_the_resolver_is_the_gateway(host: Laptop, warm: Warm, etc: str, mode: str) -> None:
    host.run("sh", "-c", ETC[etc])
    warm.vmnet(host, "create", "web", "--kind", "veth", f"--{mode}")
    before = state(host)
    # As another user, with a umask that lets nobody else read, and as a program that keeps to the path.
    command = f"umask 077; exec {sys.executable} -m vmnet exec web -- setpriv --reuid=65534 --clear-groups -- sh -c"
    said = host.run("sh", "-c", f"{command} 'cat /etc/resolv.conf; test -f /etc/resolv.conf && echo a file'")
    assert said == f"nameserver {GATEWAYS[mode]}\nsearch vmnet.internal\na file\n"
    assert warm.vmnet(host, "run", "db", f"--{mode}", "--", "cat", "/etc/resolv.conf").out != HOSTS_OWN
    assert state(host) == before


def test_the_host_is_not_asked_past_the_resolver(host: Laptop, warm: Warm) -> None:
    warm.vmnet(host, "create", "web", "--kind", "veth")
    look = ["sh", "-c", 'for path; do test -S "$path" && echo "$path"; done; :', "sh", *SOCKETS]
    assert warm.vmnet(host, "exec", "web", "--", *look).out == ""
    assert host.run(*look).split() == list(SOCKETS)


@pytest.mark.parametrize("etc", [etc for etc in ETC if etc != "missing"])
def test_a_resolver_of_the_users_own_comes_first(host: Laptop, warm: Warm, etc: str) -> None:
    host.run("sh", "-c", f"{ETC[etc]}; mkdir -p /etc/netns/web; echo nameserver 192.0.2.1 >/etc/netns/web/resolv.conf")
    warm.vmnet(host, "create", "web", "--kind", "veth")
    assert warm.vmnet(host, "exec", "web", "--", "cat", "/etc/resolv.conf").out == "nameserver 192.0.2.1\n"


def test_the_domain_is_that_of_the_settings(host: Laptop, warm: Warm) -> None:
    (host.folder / "config.toml").write_text('domain = "lab.example"\nshadow = 250\n')
    warm.vmnet(host, "create", "web", "--kind", "veth", "--mapped")
    said = warm.vmnet(host, "exec", "web", "--", "cat", "/etc/resolv.conf").out
    assert said == "nameserver 250.1.0.1\nsearch lab.example\n"


def test_the_hosts_file_spells_guests_as_the_guest_does_or_not_at_all(host: Laptop, warm: Warm) -> None:
    host.env["VMNET_HOSTS_FILE"] = "/etc/hosts"
    host.path("/etc/hosts").write_text("127.0.0.1 localhost\n192.0.2.7 printer\n")
    warm.vmnet(host, "create", "native", "--kind", "veth")
    warm.vmnet(host, "create", "mapped", "--kind", "veth", "--mapped")
    own = host.path("/etc/hosts").read_text()
    assert "127.1.0.2\tnative.vmnet.internal" in own
    assert warm.vmnet(host, "exec", "native", "--", "cat", "/etc/hosts").out == own
    seen = warm.vmnet(host, "exec", "mapped", "--", "cat", "/etc/hosts").out
    assert seen == "127.0.0.1 localhost\n192.0.2.7 printer\n"
    assert host.path("/etc/hosts").read_text() == own


def test_where_there_is_no_resolver_etc_is_not_to_be_written(host: Laptop, warm: Warm) -> None:
    warm.vmnet(host, "create", "web", "--kind", "veth")
    refused = warm.vmnet(host, "exec", "web", "--", "touch", "/etc/new", check=False)
    assert "Read-only file system" in refused.err
    host.run("touch", "/etc/resolv.conf")
    warm.vmnet(host, "exec", "web", "--", "touch", "/etc/new")
    assert host.path("/etc/new").exists()


@pytest.mark.parametrize(("mode", "spelled"), [("native", "127.1.0.6"), ("mapped", "247.1.0.6")])
def test_programs_find_other_guests_and_reach_them(host: Laptop, warm: Warm, mode: str, spelled: str) -> None:
    host.path("/etc/nsswitch.conf").write_text("hosts: files dns\n")
    warm.vmnet(host, "create", "web", "--kind", "veth", f"--{mode}")
    host.boot(warm.vmnet(host, "create", "db", "--kind", "veth", "--json").json[0]).serve()
    ask = (
        "import socket as s, sys; print([s.create_connection((name, 7), 10).getpeername()[0] for name in sys.argv[1:]])"
    )
    said = warm.vmnet(host, "exec", "web", "--", "python3", "-c", ask, "db", "db.vmnet.internal").out
    assert said == f"{[spelled, spelled]}\n"
