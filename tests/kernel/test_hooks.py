"""`vmnet hooks` on a machine of its own: what it leaves in /etc, and that vmnet works as its service confines it."""

import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.machine import wait_until
from tests.kernel.neighbours import Scene, firewalld_alone, network_manager_alone
from tests.kernel.net import SOURCES, Lab, Laptop, Result, need_own_etc, why_no_tap
from tests.kernel.warm import Warm
from tests.system.roots import NEIGHBOURS as DEBIAN
from tests.system.roots import Rooted, debian_root

SANDBOX = Path(__file__).with_name("sandbox.py")
WATCHER = "/etc/systemd/system/vmnet-watch.service"
PARTS = [
    "systemd", "sysvinit", "networkmanager", "networkmanager-dns", "dnsmasq", "resolved", "networkd", "udev", "sysctl",
    "libvirt",
    "firewalld",
]  # fmt: skip


def make_program(folder: Path, *modules: Path | str) -> Path:
    """Make a venv whose Python finds its modules in `modules`, whatever the environment; return that Python."""
    base = Path(os.path.realpath(sys.executable))
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(base)
    (folder / "pyvenv.cfg").write_text(f"home = {base.parent}\n")
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "these.pth").write_text("".join(f"{one}\n" for one in modules))
    return folder / "bin/python"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A Python that has vmnet installed, at a path that is none of the easy ones."""
    return make_program(tmp_path / "a 100% place", SOURCES, sysconfig.get_paths()["purelib"])


@pytest.fixture
def hooks(laptop: Laptop, program: Path) -> Callable[..., Result]:
    """Run `vmnet hooks` of that program in the laptop, as a service would have to call it."""
    need_own_etc()

    def call(*words: str, check: bool = True) -> Result:
        done = laptop.execute(str(program), "-m", "vmnet", "hooks", *words)
        assert not check or done.code == 0, done.err
        return done

    return call


def etc(laptop: Laptop) -> dict[str, tuple[object, ...]]:
    """Return all of the laptop's /etc: content or target, owner and mode of each path."""
    root = laptop.path("/etc")
    found: dict[str, tuple[object, ...]] = {}
    for path in root.rglob("*"):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = (content, status.st_uid, status.st_gid, status.st_mode)
    return found


def test_install_and_uninstall_leave_no_trace(laptop: Laptop, hooks: Callable[..., Result]) -> None:
    before = etc(laptop)
    installed = hooks("install", *PARTS, "--json").json
    assert {one["done"] for one in installed["files"]} == {"written"}
    after = etc(laptop)
    assert {f"/etc/{path}" for path in after.keys() - before.keys()} >= {one["path"] for one in installed["files"]}

    again = hooks("install", *PARTS, "--json").json
    assert {one["done"] for one in again["files"]} == {"same"}
    assert again["ran"] == []
    assert etc(laptop) == after

    assert {one["done"] for one in hooks("uninstall", "--json").json["files"]} == {"removed"}
    assert etc(laptop) == before
    assert hooks("uninstall", "--json").json == {"files": [], "ran": [], "to_do": []}


def test_without_a_word_it_is_what_is_found(laptop: Laptop, hooks: Callable[..., Result]) -> None:
    before = etc(laptop)
    shown = {one["part"]: one for one in hooks("status", "--json").json}
    assert list(shown) == PARTS
    planned = hooks("install", "--dry-run", "--json", check=False)
    assert planned.code == 10
    assert etc(laptop) == before

    text = hooks("install").out
    found = {part for part, one in shown.items() if one["found"]}
    assert {line.split()[0] for line in text.splitlines()[1:] if not line.startswith("ran: ")} == found
    assert all(one["path"] in text for part in found for one in shown[part]["files"])
    now = {one["part"]: one for one in hooks("status", "--json").json}
    assert {part for part, one in now.items() if one["installed"]} == found
    assert {file["state"] for part in found for file in now[part]["files"]} == {"current"}
    assert hooks("install", "--dry-run").out == ""

    assert hooks("uninstall", "--dry-run", check=False).code == 10
    hooks("uninstall")
    assert etc(laptop) == before


def test_the_init_that_is_there_gets_the_service(laptop: Laptop, hooks: Callable[..., Result]) -> None:
    def found() -> set[str]:
        return {one["part"] for one in hooks("status", "--json").json if one["found"]} & {"systemd", "sysvinit"}

    if shutil.which("start-stop-daemon") is None:
        pytest.skip("needs start-stop-daemon, of dpkg")
    folder = os.path.realpath("/sbin")
    laptop.run("mkdir", "/run/up", "/run/work")
    laptop.run(
        "mount", "-t", "overlay", "overlay", "-o", f"lowerdir={folder},upperdir=/run/up,workdir=/run/work", folder
    )
    laptop.run("rm", "-f", "/sbin/init")
    assert found() == {"sysvinit"}
    laptop.run("ln", "-s", "../lib/systemd/systemd", "/sbin/init")
    assert found() == ({"systemd"} if os.path.exists("/lib/systemd/systemd") else {"sysvinit"})
    laptop.run("rm", "/sbin/init")
    laptop.run("mkdir", "-p", "/run/systemd/system")
    assert found() == {"systemd"}


def test_what_is_not_ours_is_in_the_way(laptop: Laptop, hooks: Callable[..., Result]) -> None:
    path = laptop.path(WATCHER)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[Service]\nExecStart=/bin/sleep 1d\n")
    before = etc(laptop)
    refused = hooks("install", *PARTS, check=False)
    assert refused.code == 4
    assert WATCHER in refused.err
    assert etc(laptop) == before
    assert "left: not written by vmnet" in hooks("uninstall").out
    assert etc(laptop) == before


def test_what_was_changed_is_left(laptop: Laptop, hooks: Callable[..., Result]) -> None:
    hooks("install", *PARTS)
    path = laptop.path(WATCHER)
    path.write_text(path.read_text().replace("RestartSec=5", "RestartSec=1"))
    changed = path.read_text()
    assert re.search(f"{WATCHER} +left: changed by somebody", hooks("install", *PARTS).out)
    assert re.search(f"{WATCHER} +changed", hooks("status").out)
    assert re.search(f"{WATCHER} +left: changed by somebody", hooks("uninstall").out)
    assert path.read_text() == changed


def test_only_root_installs_and_all_may_look(laptop: Laptop, hooks: Callable[..., Result], program: Path) -> None:
    for folder in (*program.parents, laptop.folder):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", str(program), "-m", "vmnet", "hooks")
    before = etc(laptop)
    for verb in ("install", "uninstall"):
        refused = laptop.execute(*nobody, verb, "systemd")
        assert (refused.code, "only root" in refused.err) == (6, True), refused.err
    assert laptop.execute(*nobody, "install", "systemd", "--dry-run").code == 10
    assert laptop.execute(*nobody, "status").code == 0
    assert etc(laptop) == before


def test_a_vmnet_that_needs_its_environment_is_no_service(laptop: Laptop, tmp_path: Path) -> None:
    need_own_etc()
    python = make_program(tmp_path / "bare", sysconfig.get_paths()["purelib"])
    if laptop.execute(str(python), "-I", "-c", "import vmnet").code == 0:
        pytest.skip("vmnet is installed among the packages of this Python")
    before = etc(laptop)
    refused = laptop.execute(str(python), "-m", "vmnet", "hooks", "install", "systemd")
    assert (refused.code, "No module named vmnet" in refused.err) == (7, True), refused.err
    assert etc(laptop) == before


def test_words_that_make_no_sense(vmnet: Callable[..., Result]) -> None:
    assert vmnet("hooks", "install", "upstart", check=False).code == 2
    assert vmnet("hooks", "remove", check=False).code == 2
    assert vmnet("hooks", check=False).code == 2


def test_below_a_prefix_nothing_is_run_and_all_is_written(laptop: Laptop, hooks: Callable[..., Result]) -> None:
    before = etc(laptop)
    root = laptop.folder / "image"
    done = hooks("install", "--prefix", str(root), "--json").json
    assert {one["part"] for one in done["files"]} == set(PARTS)
    assert done["ran"] == []
    assert etc(laptop) == before
    assert {one["path"] for one in done["files"]} == {str(path) for path in root.rglob("*") if not path.is_dir()}
    hooks("uninstall", "--prefix", str(root))
    assert not [path for path in root.rglob("*") if not path.is_dir()]


def test_the_unit_calls_this_vmnet_on_these_records(laptop: Laptop, hooks: Callable[..., Result]) -> None:
    hooks("install", "systemd")
    units = [laptop.path(WATCHER), laptop.path(WATCHER).with_name("vmnet.service")]
    if shutil.which("systemd-analyze"):
        paths = [f"/etc/systemd/system/{unit.name}" for unit in units]
        done = laptop.execute("systemd-analyze", "verify", "--recursive-errors=no", *paths)
        assert (done.code, done.out, done.err) == (0, "", "")
    for unit in units:
        assert f'"VMNET_STATE_DIR={laptop.env["VMNET_STATE_DIR"]}"'.replace('"', "") in unit.read_text().replace(
            '"', ""
        )


def test_create_on_a_terminal_hints_at_it_until_it_is_there(laptop: Laptop, hooks: Callable[..., Result]) -> None:
    def create(name: str) -> str:
        ours, theirs = pty.openpty()
        argv = laptop.command(sys.executable, "-m", "vmnet", "create", name, "--kind", "veth")
        with subprocess.Popen(argv, stdout=theirs, stdin=theirs, stderr=subprocess.STDOUT, env=laptop.env) as running:
            running.wait()
            said = os.read(ours, 65536).decode()
        for fd in (ours, theirs):
            os.close(fd)
        assert running.returncode == 0, said
        return said

    assert "vmnet hooks install" in create("web")
    hooks("install", "systemd")
    assert "vmnet hooks install" not in create("db")


def test_sysctls_for_all_devices_pass_ours_by(laptop: Laptop, hooks: Callable[..., Result]) -> None:
    program = next(
        (one for one in ("/usr/lib/systemd/systemd-sysctl", "/lib/systemd/systemd-sysctl") if os.path.exists(one)), None
    )
    if program is None:
        pytest.skip("needs systemd-sysctl")
    hooks("install", "sysctl")
    keys = (
        "ipv4/conf/{}/rp_filter",
        "ipv4/conf/{}/forwarding",
        "ipv4/conf/{}/accept_local",
        "ipv6/conf/{}/disable_ipv6",
    )
    rules = "".join(f"net/{key.format('*')} = {value}\n" for key, value in zip(keys, (2, 0, 1, 0), strict=True))
    laptop.path("/etc/sysctl.d/60-hardened.conf").write_text(rules)
    laptop.vmnet("create", "web", "--kind", "veth")
    before = [laptop.sysctl(key.format("vmn-web")) for key in keys]
    for device in ("vmn-web", "wlan0"):  # as udev does with each new device (99-systemd.rules)
        laptop.run(program, *(f"--prefix=/net/{place}/{device}" for place in ("ipv4/conf", "ipv4/neigh", "ipv6/conf")))
    assert [laptop.sysctl(key.format("wlan0")) for key in keys] == ["2", "0", "1", "0"]
    assert [laptop.sysctl(key.format("vmn-web")) for key in keys] == before
    assert laptop.vmnet("plan").out == ""


# The service


@pytest.fixture
def confined(laptop: Laptop, hooks: Callable[..., Result], program: Path) -> list[str]:
    """How to run vmnet in the laptop as the unit of the watcher confines it."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze, of systemd")
    hooks("install", "systemd")
    return [sys.executable, str(SANDBOX), WATCHER, str(program), "-I", "-m", "vmnet"]


@pytest.fixture
def damaged(laptop: Laptop) -> Callable[[], None]:
    """Guests of all kinds, folders of a user's, and what undoes all that vmnet has set for them."""
    stranger = laptop.start(
        "unshare", "--net", "setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", "echo $$; cat"
    )
    assert stranger.stdout
    pid = stranger.stdout.readline().strip()
    laptop.vmnet("create", "web", "--kind", "veth")
    laptop.vmnet("create", "job", "--netns", f"/proc/{pid}/ns/net")
    if why_no_tap() is None:
        laptop.vmnet("create", "box")
    for path in (laptop.hosts_file, laptop.folder / "state", laptop.folder / "run"):
        os.chown(path, 65534, 65534)
    laptop.hosts_file.chmod(0o664)

    def damage() -> None:
        laptop.ip("link del vmn-web", "link del vmn-job", "addr add 127.0.0.1/8 dev lo")
        laptop.ip("route flush table local proto 127", "route flush proto 127", check=False)
        laptop.run("ip", "netns", "del", "web")
        laptop.run("nft", "flush", "ruleset")
        laptop.sysctl("ipv4/ip_forward", 0)
        laptop.hosts_file.write_text("127.0.0.1 localhost\n")

    return damage


def is_right(laptop: Laptop) -> bool:
    return laptop.vmnet("plan", check=False).code == 0


def test_the_service_of_the_boot_works_within_its_sandbox(
    laptop: Laptop, confined: list[str], damaged: Callable[[], None]
) -> None:
    damaged()
    assert not is_right(laptop)
    replaced = laptop.hosts_file.stat().st_ino
    done = laptop.execute(*confined, "watch", "--once")
    assert (done.code, done.err) == (0, "")
    assert is_right(laptop)
    assert "web.vmnet.internal" in laptop.hosts_file.read_text()
    found = laptop.hosts_file.stat()
    assert found.st_ino != replaced
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (65534, 65534, 0o664)


def test_the_server_works_within_its_sandbox(laptop: Laptop, confined: list[str], damaged: Callable[[], None]) -> None:
    os.chown(laptop.folder / "run", 0, 0)
    unit = WATCHER.replace("watch", "server")
    server = laptop.start(*(unit if word == WATCHER else word for word in confined), "serve")
    assert server.stderr is not None
    assert "serving" in server.stderr.readline()
    client = [confined[2 + confined.index(str(SANDBOX))], "-I", "-m", "vmnet"]

    def served(*words: str) -> Result:
        done = laptop.execute(*client[:1], "-X", "importtime", *client[1:], *words)
        assert "typer" not in done.err, "the server did not do it"
        return Result(done.code, done.out, "".join(re.findall(r"^vmnet: .*\n", done.err, re.MULTILINE)))

    kinds = {"new": ["--kind", "veth"], "tun": ["--kind", "tun"], "here": ["--kind", "alias"]}
    if why_no_tap() is None:
        kinds["vm"] = ["--owner", "65534"]
    for name, options in kinds.items():
        assert served("create", name, *options).code == 0, name
    damaged()
    assert served("up") == Result(0, "", "")
    assert is_right(laptop)
    assert "web.vmnet.internal" in laptop.hosts_file.read_text()
    assert served("relay", "here", "80:127.0.0.1:8080").code == 0
    assert served("down", "web").code == 0
    assert served("delete", "--all") == Result(0, "", "")
    assert served("restore", "--purge") == Result(0, "", "")
    laptop.run("pkill", "-TERM", "-o", "-f", "vmnet serve$")
    assert server.wait(60) == 0


def test_a_group_that_is_there_gets_the_socket(laptop: Laptop, hooks: Callable[..., Result]) -> None:
    socket_unit = laptop.path("/etc/systemd/system/vmnet-server.socket")
    hooks("install", "systemd")
    assert "SocketMode=0600" in socket_unit.read_text()
    laptop.run("groupadd", "--system", "vmnet")
    assert "outdated" in hooks("status", "systemd").out
    hooks("install", "systemd")
    assert "SocketGroup=vmnet\nSocketMode=0660\n" in socket_unit.read_text()


def test_the_watcher_works_within_its_sandbox(laptop: Laptop, confined: list[str], damaged: Callable[[], None]) -> None:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    laptop.lab.at_exit(manager.close)
    manager.bind(str(laptop.folder / "notify"))
    said: list[bytes] = []
    laptop.lab.loop.watch(manager.fileno(), lambda: said.append(manager.recv(4096)))
    laptop.env |= {"NOTIFY_SOCKET": str(laptop.folder / "notify"), "WATCHDOG_USEC": "400000"}
    watcher = laptop.start(*confined, "watch", "--interval", "3600")
    assert wait_until(lambda: b"READY=1" in b"".join(said) and b"WATCHDOG=1" in b"".join(said), 60)

    damaged()
    assert wait_until(lambda: is_right(laptop), 60)
    # Inside the namespace of somebody else's process, too.
    job = laptop.vmnet("show", "job", "--json").json
    inside = ("nsenter", f"--net={job['netns']}", "ip")
    laptop.run(*inside, "route", "flush", "table", "local", "proto", "127")
    laptop.run(*inside, "route", "del", "default")
    assert wait_until(lambda: is_right(laptop), 60)

    pid = str(laptop.vmnet("watch", "--status", "--json").json["pid"])
    laptop.run("kill", "-HUP", pid)
    laptop.run("kill", "-TERM", pid)
    _, log = watcher.communicate(timeout=60)
    assert watcher.returncode == 0, log
    assert "wrong" not in log


def test_an_init_script_keeps_the_watcher_running(laptop: Laptop, hooks: Callable[..., Result]) -> None:
    if shutil.which("start-stop-daemon") is None:
        pytest.skip("needs start-stop-daemon, of dpkg")
    hooks("install", "sysvinit")
    assert laptop.path("/etc/init.d/vmnet").stat().st_mode & 0o777 == 0o755
    (laptop.path("/etc/default") / "vmnet").write_text("log=/run/vmnet.log\n")

    def service(verb: str) -> int:
        return laptop.execute("/etc/init.d/vmnet", verb, env={"PATH": "/bin"}).code

    def watcher() -> int | None:
        pid: int | None = laptop.vmnet("watch", "--status", "--json", check=False).json["pid"]
        return pid

    laptop.vmnet("create", "web", "--kind", "veth")
    laptop.ip("link del vmn-web")
    assert service("status") == 3
    assert service("start") == 0
    assert is_right(laptop)
    assert wait_until(lambda: watcher() is not None, 60)
    first = watcher()
    assert service("start") == 0
    assert service("status") == 0

    laptop.run("kill", "-KILL", str(first))
    assert wait_until(lambda: watcher() not in (first, None), 60)
    second = watcher()
    assert service("reload") == 0
    assert watcher() == second

    assert service("stop") == 0
    assert laptop.execute("pgrep", "-f", "vmnet watch").code == 1
    assert service("stop") == 0
    assert service("status") == 3


@pytest.mark.root
def test_daemons_that_run_hear_of_it_and_lose_nothing_of_others(
    laptop: Laptop, lab: Lab, warm: Warm, hooks: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(warm, lab)
    scene.debian = debian = Rooted(laptop, debian_root("neighbours", DEBIAN))
    scene.create()
    firewalld_alone(scene)
    monkeypatch.setattr(scene, "bus", lambda: None)  # there is one now
    network_manager_alone(scene)
    scene.debian_run("firewall-cmd", "--zone=public", "--add-port=4711/tcp")
    # The Debian system's /etc in place of the laptop's, and its programs.
    laptop.run("mount", "-t", "tmpfs", "tmpfs", "/usr/local/sbin")
    for name in ("firewall-cmd", "nmcli"):
        program = laptop.path(f"/usr/local/sbin/{name}")
        program.write_text(f'#!/bin/sh\nexec chroot {debian._inside} {name} "$@"\n')
        program.chmod(0o755)
    laptop.run("mount", "--bind", f"{debian._inside}/etc", "/etc")
    before = etc(laptop)

    def unmanaged() -> set[str]:
        listed = scene.debian_run("nmcli", "-t", "-f", "DEVICE,STATE", "device")
        return {line.partition(":")[0] for line in listed.splitlines() if line.endswith(":unmanaged")}

    ours = {one.host_device for one in scene.guests} | {"lo"}
    assert not ours <= unmanaged()
    done = hooks("install", "firewalld", "networkmanager")
    assert done.err == ""
    assert wait_until(lambda: ours <= unmanaged(), 60)
    laptop.vmnet("up")
    scene.assert_guests_work()
    assert scene.debian_run("firewall-cmd", "--zone=public", "--query-port=4711/tcp").strip() == "yes"
    assert "ran: " not in hooks("install", "firewalld", "networkmanager").out

    scene.debian_run("firewall-cmd", "--reload")
    assert scene.debian_run("firewall-cmd", "--get-zone-of-interface=vmn-+").strip() == "vmnet"
    scene.assert_guests_work()
    assert hooks("uninstall").err == ""
    assert scene.debian_run("firewall-cmd", "--get-zone-of-interface=vmn-+", check=False).strip() != "vmnet"
    assert etc(laptop) == before
