"""Names: NAME.vmnet.internal leads to the guest for every program of the host, and the hosts file is left as it was.

Programs are asked through getaddrinfo in the laptop, whose /etc/hosts is the very file that vmnet keeps.
"""

import pytest

from tests.kernel.net import Laptop, need_own_etc
from tests.kernel.warm import Warm

VETH = ("--kind", "veth")
ORIGINALS = {
    "usual": b"127.0.0.1\tlocalhost\n127.0.1.1\tlaptop\n::1 ip6-localhost\n",
    "no final newline": b"127.0.0.1 localhost\n# the end",
    "empty": b"",
    "carriage returns and other bytes": b"127.0.0.1 localhost\r\n\xff\xfe \x00\r\n\n\n",
    "a block without guests": b"127.0.0.1 localhost\n# BEGIN someone\n10.0.0.1 a\n# END someone\n",
}
NO_NEWLINE = [("no final newline", end) for end in ("delete g", "down g", "down", "restore")]


@pytest.fixture(params=["a file", "a mount"])
def hosts(request: pytest.FixtureRequest, laptop: Laptop) -> Laptop:
    """The laptop with its hosts file as /etc/hosts: a file of its own, or mounted there as container engines do."""
    need_own_etc()
    laptop.path("/etc/nsswitch.conf").write_text("hosts: files\n")
    if request.param == "a mount":
        laptop.run("mount", "--bind", str(laptop.hosts_file), "/etc/hosts")
    laptop.env["VMNET_HOSTS_FILE"] = "/etc/hosts"
    return laptop


def content(laptop: Laptop) -> bytes:
    return laptop.path("/etc/hosts").read_bytes()


def resolve(laptop: Laptop, name: str) -> list[str]:
    """Return what getaddrinfo, in a program of the laptop, gives for a name."""
    shown = laptop.run("getent", "ahostsv4", name, check=False)
    return sorted({line.split()[0] for line in shown.splitlines()})


def test_a_name_leads_to_its_guest(hosts: Laptop, warm: Warm) -> None:
    start = content(hosts)
    [info] = warm.vmnet(hosts, "create", "web", *VETH, "--json").json
    hosts.boot(info).serve()
    assert resolve(hosts, "web.vmnet.internal") == [info["address"]] == resolve(hosts, info["hostname"])
    answer = hosts.run(
        "python3", "-c", "import socket; print(socket.create_connection(('web.vmnet.internal', 7), 3).getpeername()[0])"
    )
    assert answer.strip() == info["address"]
    warm.vmnet(hosts, "create", "db", "mail", *VETH)
    warm.vmnet(hosts, "down", "db")
    assert resolve(hosts, "db.vmnet.internal") == []
    assert resolve(hosts, "mail.vmnet.internal") == [warm.vmnet(hosts, "ip", "mail").out.strip()]
    warm.vmnet(hosts, "up", "db")
    warm.vmnet(hosts, "delete", "web")
    assert resolve(hosts, "web.vmnet.internal") == []
    assert resolve(hosts, "db.vmnet.internal") == [warm.vmnet(hosts, "ip", "db").out.strip()]
    warm.vmnet(hosts, "delete", "--all")
    assert content(hosts) == start


@pytest.mark.parametrize(("name", "end"), [*((name, "delete --all") for name in ORIGINALS), *NO_NEWLINE])
def test_the_file_is_the_same_when_the_last_guest_is_gone(name: str, end: str, laptop: Laptop, warm: Warm) -> None:
    laptop.hosts_file.write_bytes(ORIGINALS[name])
    laptop.hosts_file.chmod(0o640)
    warm.vmnet(laptop, "create", "g", *VETH)
    assert b"127.1.0.2\tg.vmnet.internal\n" in laptop.hosts_file.read_bytes()
    warm.vmnet(laptop, *end.split())
    assert laptop.hosts_file.read_bytes() == ORIGINALS[name]
    assert laptop.hosts_file.stat().st_mode & 0o7777 == 0o640
    assert {path.name for path in laptop.folder.iterdir()} == {"hosts", "state", "run"}


def test_a_file_that_was_not_there_goes_again(laptop: Laptop, warm: Warm) -> None:
    laptop.hosts_file.unlink()
    warm.vmnet(laptop, "create", "g", *VETH)
    assert b"g.vmnet.internal" in laptop.hosts_file.read_bytes()
    warm.vmnet(laptop, "delete", "g")
    assert not laptop.hosts_file.exists()


def test_the_domain_is_a_setting(hosts: Laptop, warm: Warm) -> None:
    start = content(hosts)
    config = hosts.folder / "config.toml"
    config.write_text('domain = "vm.example"\n')
    [info] = warm.vmnet(hosts, "create", "web", *VETH, "--json").json
    assert info["hostname"] == "web.vm.example"
    assert resolve(hosts, "web.vm.example") == ["127.1.0.2"]
    config.write_text('domain = "home.arpa"\n')
    assert "names" in warm.vmnet(hosts, "plan", check=False).out
    warm.vmnet(hosts, "up")
    assert (resolve(hosts, "web.vm.example"), resolve(hosts, "web.home.arpa")) == ([], ["127.1.0.2"])
    config.unlink()
    warm.vmnet(hosts, "restore")
    assert content(hosts) == start


def test_many_at_once_are_all_in_it(hosts: Laptop, warm: Warm) -> None:
    start = content(hosts)
    names = [f"g{number}" for number in range(16)]
    calls = [warm.start(hosts, "create", name, *VETH) for name in names]
    for call in calls:
        assert call.wait().code == 0
    for name in names:
        assert resolve(hosts, f"{name}.vmnet.internal") == [warm.vmnet(hosts, "ip", name).out.strip()]
    calls = [warm.start(hosts, "delete", name) for name in names]
    for call in calls:
        assert call.wait().code == 0
    assert content(hosts) == start


def test_what_others_write_meanwhile_stays(laptop: Laptop, warm: Warm) -> None:
    warm.vmnet(laptop, "create", "a", *VETH)
    with laptop.hosts_file.open("a") as file:
        file.write("10.0.0.1 theirs\n127.77.0.1 far\n")
    warm.vmnet(laptop, "create", "b", *VETH)
    warm.vmnet(laptop, "delete", "a", "b")
    lines = laptop.hosts_file.read_text().splitlines()
    assert lines == ["127.0.0.1 localhost", "127.0.1.1 laptop", "10.0.0.1 theirs", "127.77.0.1 far"]


def test_a_block_that_was_edited_away_is_drift(laptop: Laptop, warm: Warm) -> None:
    warm.vmnet(laptop, "create", "web", *VETH)
    right = laptop.hosts_file.read_bytes()
    laptop.hosts_file.write_bytes(right.replace(b"web.vmnet", b"wob.vmnet"))
    assert "names" in warm.vmnet(laptop, "plan", check=False).out
    warm.vmnet(laptop, "up")
    assert laptop.hosts_file.read_bytes() == right
    assert warm.vmnet(laptop, "plan").out == ""


def test_a_file_that_somebody_has_replaced_has_all_names_again_with_the_next_guest(laptop: Laptop, warm: Warm) -> None:
    warm.vmnet(laptop, "create", "web", "db", *VETH)
    laptop.hosts_file.write_text("127.0.0.1 localhost\n")
    warm.vmnet(laptop, "create", "late", *VETH)
    assert warm.vmnet(laptop, "plan").out == ""
    assert [line.split()[1].partition(".")[0] for line in laptop.hosts_file.read_text().splitlines()[2:5]] == [
        "web",
        "db",
        "late",
    ]


def test_a_file_that_cannot_be_written_costs_a_warning_only(laptop: Laptop, warm: Warm) -> None:
    start = laptop.hosts_file.read_bytes()
    laptop.run("mount", "--bind", str(laptop.hosts_file), str(laptop.hosts_file))
    laptop.run("mount", "-o", "remount,bind,ro", str(laptop.hosts_file))
    for command in (["create", "web", *VETH], ["up"], ["delete", "web"], ["create", "web", *VETH], ["restore"]):
        result = warm.vmnet(laptop, *command)
        # Nothing is to be written by the two that take all names away.
        expected = 0 if command[0] in ("delete", "restore") else 1
        assert result.err.count("hosts") >= expected, command
        assert len(result.err.splitlines()) == expected, result.err
        if command[0] == "create":
            assert laptop.ping("127.1.0.2")
    assert laptop.hosts_file.read_bytes() == start


def test_without_a_hosts_file_none_is_kept(laptop: Laptop, warm: Warm) -> None:
    etc, own = laptop.path("/etc/hosts").read_bytes(), laptop.hosts_file.read_bytes()
    laptop.env["VMNET_HOSTS_FILE"] = ""
    result = warm.vmnet(laptop, "create", "web", *VETH)
    assert result.err == ""
    assert "WriteNames" not in warm.vmnet(laptop, "plan", "--json").out
    warm.vmnet(laptop, "restore")
    assert (laptop.path("/etc/hosts").read_bytes(), laptop.hosts_file.read_bytes()) == (etc, own)


def test_the_name_of_a_guest_is_its_own(laptop: Laptop, warm: Warm) -> None:
    """Names that are lines of their own in the file, such as localhost, are other names: the domain follows."""
    need_own_etc()
    warm.vmnet(laptop, "create", "localhost", "laptop", *VETH)
    laptop.path("/etc/nsswitch.conf").write_text("hosts: files\n")
    laptop.path("/etc/hosts").write_bytes(laptop.hosts_file.read_bytes())
    assert resolve(laptop, "localhost") == ["127.0.0.1"]
    assert resolve(laptop, "localhost.vmnet.internal") == [warm.vmnet(laptop, "ip", "localhost").out.strip()]
