"""Guests on a Mac are back after a reboot: by the file that launchd has of vmnet, and by what it runs."""

import os
import plistlib
from pathlib import Path
from typing import Any

import pytest

from tests.darwin.mac import Mac
from tests.kernel.machine import wait_until
from vmnet.hooks.call import Call
from vmnet.hooks.install import Run, apply, look, plan_install, plan_uninstall
from vmnet.hooks.parts import parts_here

PLIST = "/Library/LaunchDaemons/internal.vmnet.watch.plist"
DAEMON = "system/internal.vmnet.watch"
ALIASES = {"127.0.0.1": 0xFF000000, "127.1.0.2": 0xFFFFFFFF}


def written(mac: Mac) -> dict[str, Any]:
    """Return what is in the plist that is made for this Mac."""
    root = mac.folder / "image"
    done = mac.vmnet("hooks", "install", "--prefix", str(root), "--json").json
    assert done["files"] == [{"part": "launchd", "path": f"{root}{PLIST}", "done": "written"}]
    found: dict[str, Any] = plistlib.loads(Path(f"{root}{PLIST}").read_bytes())
    return found


def test_the_plist_starts_the_watcher_at_boot(mac: Mac) -> None:
    state = mac.folder / "state & <co>"
    mac.env["VMNET_STATE_DIR"] = str(state)
    found = written(mac)
    assert (found["Label"], found["RunAtLoad"], found["KeepAlive"]) == ("internal.vmnet.watch", True, True)
    assert os.path.isabs(found["ProgramArguments"][0])
    assert found["ProgramArguments"][-1] == "watch"
    variables = found["EnvironmentVariables"]
    assert variables["PATH"].split(":")[0] == "/sbin"
    assert variables["VMNET_STATE_DIR"] == str(state)


def test_what_launchd_runs_brings_guests_back_after_a_reboot(mac: Mac) -> None:
    mac.vmnet("create", "web")
    found = written(mac)
    with mac.changed() as state:
        state["ifaces"]["lo0"]["addrs"] = [
            one for one in state["ifaces"]["lo0"]["addrs"] if one.get("mask") != 0xFFFFFFFF
        ]
        state["calls"] = []
    mac.env = {
        **found["EnvironmentVariables"],
        **{name: mac.env[name] for name in ("PATH", "FAKE_MAC_STATE", "VMNET_PLATFORM")},
    }
    daemon = mac.start(*found["ProgramArguments"])
    assert wait_until(lambda: mac.aliases() == ALIASES, 30)
    assert ["ifconfig", "lo0", "alias", "127.1.0.2", "netmask", "255.255.255.255"] in mac.calls()
    daemon.terminate()
    assert daemon.wait(30) == 0


def test_launchd_is_told(mac: Mac, monkeypatch: pytest.MonkeyPatch) -> None:
    root = mac.folder / "root"
    monkeypatch.setenv("FAKE_MAC_ROOT", str(root))
    for name in ("PATH", "FAKE_MAC_STATE", "VMNET_PLATFORM"):
        monkeypatch.setenv(name, mac.env[name])
    argv = ("/opt/vmnet/bin/python", "-I", "-m", "vmnet")

    def install(call: Call) -> list[tuple[str, ...]]:
        """Install, and return what was run for it."""
        steps = plan_install(look(parts_here(), call, root), live=True)
        assert apply(steps, mark=True) == []
        return [step.argv for step in steps if isinstance(step, Run)]

    out, load = ("launchctl", "bootout", DAEMON), ("launchctl", "bootstrap", "system", PLIST)
    assert install(Call(argv, {})) == [load]
    assert mac.run("launchctl", "print", DAEMON).code == 0
    assert install(Call(argv, {})) == []
    assert install(Call(argv, {"VMNET_RUN_DIR": "/srv/run"})) == [out, load]
    mac.set(services={})
    assert install(Call(argv, {"VMNET_RUN_DIR": "/srv/run"})) == [load]
    steps = plan_uninstall(look(parts_here(), Call(argv, {}), root), live=True)
    assert apply(steps, mark=True) == []
    assert mac.state["services"] == {}
    assert not list(root.rglob("*.plist"))


def test_there_is_one_part_and_its_steps_can_be_seen(mac: Mac) -> None:
    assert [one["part"] for one in mac.vmnet("hooks", "status", "--json").json] == ["launchd"]
    shown = mac.vmnet("hooks", "install", "launchd", "--dry-run", check=False)
    assert (shown.code, shown.out) == (10, f"+ file {PLIST}\n! launchctl bootstrap system {PLIST}\n")
    assert mac.vmnet("hooks", "install", "systemd", check=False).code == 2
