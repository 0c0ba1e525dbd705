"""Guests from a file: made all or none, left as they are, refused where they differ, pruned where apply made them."""

import contextlib
import os
import re
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.net import Laptop, Result
from tests.kernel.test_cli import dry, files_of, run, states  # noqa: F401 -- a fixture
from tests.kernel.test_manual import ROOT, replay, shell  # noqa: F401 -- a fixture

Run = Callable[..., Result]
PAGE = "docs/how-to/apply.md"
WEB = "[guest.web]\nkind = 'veth'\nnetns = 'there'\naddress = '127.2.0.2'\nmac = '02:00:00:00:00:07'\nmtu = 1400\n"
DB = "[guest.db]\nkind = 'veth'\nmode = 'mapped'\nowner = 7\n"


@pytest.fixture
def write(laptop: Laptop) -> Callable[[str], str]:
    """Write the file of guests, and return its path."""

    def write_(text: str) -> str:
        path = laptop.folder / "guests.toml"
        path.write_text(text)
        return str(path)

    return write_


Write = Callable[[str], str]


def kept(laptop: Laptop) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return all that a command that changes nothing must leave as it is."""
    return laptop.snapshot(), files_of(laptop)


def test_a_file_is_applied_once(laptop: Laptop, run: Run, write: Write) -> None:  # noqa: F811
    file = write(WEB + DB)
    folders = sorted(laptop.folder.iterdir())
    fresh = laptop.snapshot()
    assert "+ address 247.2.0.1/30 on vmn-web" in dry(run, "apply", file)
    assert (laptop.snapshot(), sorted(laptop.folder.iterdir())) == (fresh, folders)
    typed = run("apply", file, "--dry-run", "-v", check=False).out
    done = run("apply", file, "--json", "-v")
    assert sorted(done.err.splitlines()) == sorted(typed.splitlines())
    web, db = done.json["guests"]
    assert done.json["deleted"] == []
    assert (web["name"], web["netns"], web["address"], web["mtu"]) == ("web", "there", "127.2.0.2", 1400)
    assert (db["name"], db["netns"], db["mode"], db["owner"]) == ("db", "db", "mapped", 7)
    assert states(run) == {"db": "up", "web": "up"}
    before = kept(laptop)
    for words in ([], ["--prune"]):
        again = run("apply", file, *words, "--json", "-v")
        assert (again.json, again.err) == ({"guests": [web, db], "deleted": []}, "")
        assert dry(run, "apply", file, *words) == []
    table = [line.split() for line in run("apply", file).out.splitlines()]
    assert [row[0] for row in table] == ["NAME", "web", "db"]
    # Options that the file leaves out are not compared.
    assert run("apply", write("[guest.web]\n"), "--json").json["guests"] == [web]
    assert kept(laptop) == before
    # What has drifted is put right, as by create.
    laptop.run("ip", "link", "del", "vmn-db")
    run("apply", write(DB))
    assert states(run) == {"db": "up", "web": "up"}


def test_another_value_is_a_conflict_and_then_nothing_is_done(laptop: Laptop, run: Run, write: Write) -> None:  # noqa: F811
    run("apply", write(WEB + DB))
    before = kept(laptop)
    other = {
        "kind": "'tap'",
        "netns": "'elsewhere'",
        "address": "'127.2.0.6'",
        "mac": "'02:00:00:00:00:08'",
        "mtu": "1500",
        "mode": "'mapped'",
        "queues": "2",
        "owner": "8",
    }
    for key, value in other.items():
        file = write(f"[guest.new]\nkind = 'veth'\n[guest.web]\n{key} = {value}\n")
        for words in ([], ["--prune"], ["--dry-run"], ["--prune", "--dry-run"]):
            refused = run("apply", file, *words, check=False)
            assert refused.code == 4, (key, words)
            assert f"web exists with {key} " in refused.err
    # The address of another; the namespace of another.
    for line, told in (("address = '127.2.0.2'", "127.2.0.2 is held by web"), ("netns = 'there'", "there")):
        refused = run("apply", write(f"[guest.new]\nkind = 'veth'\n{line}\n"), "--prune", check=False)
        assert (refused.code, told in refused.err) == (4, True), refused
        assert states(run) == {"db": "up", "web": "up"}
    assert laptop.snapshot() == before[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[guest.a]\nmtu = 5", "guest.a.mtu 5 is not between"),
        ("[guest.a]\ncolour = 'red'", "guest.a: there is no key 'colour'"),
        ("[guest.A]", "'A' is not a guest name"),
        ("[guest.a", "is not TOML"),
        ("[guest.a]\nkind = 'tap'\nmode = 'native'", "guest.a: a tap is always mapped"),
        ("[guest.a]\nkind = 'tun'\nmac = '02:00:00:00:00:01'", "guest.a: a tun has no MAC"),
        ("[guest.a]\nkind = 'tun'\naddress = '127.1.0.3'", "guest.a: 127.1.0.3 is not an address for a guest"),
        ("[guest.a]\nkind = 'tun'\naddress = '10.0.0.2'", "guest.a: 10.0.0.2 is not in the pool"),
        ("[guest.a]\nnetns = '..'", "guest.a: '..' names no network namespace"),
        ("[guest.web]\nnetns = './x'", "guest.web: './x' names no network namespace"),
    ],
)
def test_what_is_wrong_in_a_file_changes_nothing(
    laptop: Laptop,
    run: Run,  # noqa: F811
    write: Write,
    text: str,
    told: str,
) -> None:
    run("apply", write("[guest.web]\nkind = 'veth'\n"))
    before = kept(laptop)
    file = write(f"[guest.ok]\nkind = 'veth'\n{text}\n")
    for words in (["--prune"], ["--prune", "--dry-run"], ["--prune", "--json"]):
        refused = run("apply", file, *words, check=False)
        assert refused.code == 2, refused
        assert told in refused.err
        assert file in refused.err
        assert "--json" not in words or refused.json["error"]["code"] == 2
    assert kept(laptop) == before


def test_prune_takes_what_apply_made_and_nothing_else(laptop: Laptop, run: Run, write: Write) -> None:  # noqa: F811
    run("create", "own", "named", "--kind", "veth")
    run("apply", write("guest.a.kind = 'veth'\nguest.b.kind = 'veth'\nguest.named.kind = 'veth'\n"))
    run("create", "a", "--kind", "veth")  # which is there already, so it stays apply's
    file = write("guest.b.kind = 'veth'\nguest.c.kind = 'veth'\n")
    # Without --prune all that is not named stays.
    run("apply", file)
    assert set(states(run)) == {"a", "b", "c", "named", "own"}
    before = kept(laptop)
    lines = dry(run, "apply", file, "--prune")
    assert "- namespace /run/netns/a" in lines
    assert kept(laptop) == before
    typed = run("apply", file, "--prune", "--dry-run", "-v", check=False).out
    done = run("apply", file, "--prune", "--json", "-v")
    assert sorted(done.err.splitlines()) == sorted(typed.splitlines())
    assert (done.json["deleted"], [one["name"] for one in done.json["guests"]]) == (["a"], ["b", "c"])
    assert "vmn-a" not in laptop.links()
    assert "a.vmnet.internal" not in laptop.hosts_file.read_text()
    assert not laptop.path("/run/netns/a").exists()
    assert run("apply", file, "--prune", "--json").json["deleted"] == []
    # A name that comes back by create is create's.
    run("create", "a", "--kind", "veth")
    run("delete", "b")
    run("create", "b", "--kind", "veth")
    nobody = write("")
    assert run("apply", nobody, "--prune").out == "c is deleted\n"
    assert set(states(run)) == {"a", "b", "named", "own"}
    assert run("apply", nobody).out == ""
    assert dry(run, "apply", nobody, "--prune") == []


def test_nobody_is_made_of_a_file_without_guests(laptop: Laptop, run: Run, write: Write) -> None:  # noqa: F811
    before = laptop.snapshot()
    assert run("apply", write("[guest]\n"), "--prune", "--json").json == {"guests": [], "deleted": []}
    assert dry(run, "apply", write("")) == []
    assert laptop.snapshot() == before


def test_what_cannot_be_made_leaves_all_others(laptop: Laptop, run: Run, write: Write) -> None:  # noqa: F811
    run("apply", write("guest.a.kind = 'veth'\n"))
    laptop.run("ip", "link", "add", "vmn-c", "type", "bridge")
    before = laptop.snapshot()
    refused = run("apply", write("guest.b.kind = 'veth'\nguest.c.kind = 'veth'\n"), "--prune", check=False)
    assert (refused.code, "vmn-c" in refused.err) == (4, True)
    assert states(run) == {"a": "up"}
    assert laptop.snapshot() == before


def test_down_is_a_wish_that_a_file_does_not_end(laptop: Laptop, run: Run, write: Write) -> None:  # noqa: F811
    file = write("guest.a.kind = 'veth'\nguest.b.kind = 'veth'\n")
    run("apply", file)
    run("down", "a")
    assert dry(run, "apply", file, "--prune") == []
    done = run("apply", file, "--prune", "--json").json
    assert [one["state"] for one in done["guests"]] == ["down", "up"]
    assert states(run) == {"a": "down", "b": "up"}
    assert run("apply", write("guest.b.kind = 'veth'\n"), "--prune", "--json").json["deleted"] == ["a"]
    assert os.listdir(laptop.path("/run/netns")) == ["b"]


def test_a_file_comes_by_standard_input(laptop: Laptop) -> None:
    done = laptop.vmnet("apply", "-", "--json", stdin="guest.a.kind = 'veth'\n").json
    assert [one["name"] for one in done["guests"]] == ["a"]
    refused = laptop.vmnet("apply", "-", stdin="guest.a.mtu = 5\n", check=False)
    assert (refused.code, "standard input: guest.a.mtu 5" in refused.err) == (2, True)
    closed = laptop.execute("sh", "-c", f"exec {sys.executable} -m vmnet apply - <&-")
    assert (closed.code, "standard input cannot be read" in closed.err) == (2, True)


def test_records_of_before_are_brought_along(laptop: Laptop, run: Run, write: Write) -> None:  # noqa: F811
    run("create", "old", "--kind", "veth")
    path = Path(laptop.env["VMNET_STATE_DIR"]) / "vmnet.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("DROP INDEX lease_mtu")
        db.execute("ALTER TABLE lease DROP COLUMN applied")
        db.execute("PRAGMA user_version = 1")
        db.commit()
    before = kept(laptop)
    file = write("guest.old.kind = 'veth'\nguest.new.kind = 'veth'\n")
    assert states(run) == {"old": "up"}
    assert dry(run, "apply", file, "--prune") != []
    assert kept(laptop) == before
    run("apply", file)
    assert run("apply", write(""), "--prune", "--json").json["deleted"] == ["new"]
    assert states(run) == {"old": "up"}


def test_the_page_runs_as_it_stands(shell: Laptop) -> None:  # noqa: F811
    [file] = re.findall(r"```toml\n(.*?)```", (ROOT / PAGE).read_text(), re.DOTALL)
    (shell.folder / "guests.toml").write_text(file)
    blocks = (ROOT / PAGE).read_text().count("```console\n")
    for number in range(blocks):
        replay(shell, PAGE, number)
    assert blocks == 3
