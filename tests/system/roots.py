"""Small Debian systems to run real neighbours in: made once, kept, and never written to by a test.

    from tests.system.roots import NEIGHBOURS, Rooted, debian_root

    @pytest.fixture
    def debian(laptop: Laptop) -> Rooted:
        return Rooted(laptop, debian_root("neighbours", NEIGHBOURS))

    def test_ufw(laptop: Laptop, debian: Rooted) -> None:
        debian.path("/etc/default/ufw").write_text("...")            # seen by this test alone
        debian.run("ufw", "--force", "enable")                       # Debian's ufw, on the laptop's network
        daemon = debian.start("firewalld", "--nofork", "--nopid")    # ends with the laptop at the latest
        assert "ufw" in laptop.run("nft", "list", "ruleset")

A program runs in the laptop's network and process namespaces, with the laptop's /proc, /sys and /run (namespaces named
in /run/netns are seen by both, whoever makes them) and the machine's /dev; all other files, users and the environment
are the Debian system's own, below an overlay of this test's. There is no systemd as pid 1: a daemon is started by its
command (`dbus-daemon --system` first, for those that want it).

`debian_root` makes a system by debootstrap from the mirror of this machine's own apt: about 50 s and 60 MB the first
time, nothing after that. It skips the test where that cannot be done, and says why. What is kept lies in
`$VMNET_TESTS_CACHE`, by default ~/.cache/vmnet-tests, and can be deleted at any time when no test runs.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import is_real_root
from tests.kernel.net import Laptop, Result

NEIGHBOURS = (
    "aardvark-dns",
    "dbus",
    "firewalld",
    "iproute2",
    "iptables",
    "libpam-systemd",
    "netavark",
    "network-manager",
    "nftables",
    "procps",
    "python3",
    "systemd",
    "systemd-resolved",
    "ufw",
)
"""What changes a laptop's network besides vmnet.

debootstrap knows no virtual packages: libpam-systemd stands here for the `logind` that polkitd, and so firewalld and
NetworkManager, depend on.
"""

_NO_FILES: Mapping[str, str] = {}
_DPKG_FILE = "etc/dpkg/dpkg.cfg.d/kept"
# Nothing of the kept systems is ever read by a person.
_DPKG = """\
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/locale/*
"""
# No mount, process or network setting of this machine is in reach of a package's scripts, and they start no service:
# debootstrap sees to that by a policy-rc.d of its own.
_CONFIGURE = """
unshare --mount --propagation private --net --pid --fork --kill-child sh -euc '
    mount -t sysfs sysfs "$1/sys"
    chroot "$1" /debootstrap/debootstrap --second-stage' sh "$1"
rm -rf "$1/var/cache/apt/archives" "$1/var/lib/apt/lists"
"""
_ENTER = """
cd "$1" && mkdir -p root && mount -t tmpfs tmpfs root && cd root && mkdir upper work system &&
mount -t overlay overlay -o "lowerdir=$2,upperdir=upper,workdir=work" system && cd system &&
mount --make-rshared /run && for top in proc sys run dev; do mount --rbind "/$top" "$top" || exit; done
"""


def cache() -> Path:
    """Return the folder in which the tests keep what takes long to make."""
    kept = os.environ.get("VMNET_TESTS_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(kept) if kept else base / "vmnet-tests"


def suite() -> str:
    """Return the Debian release that is used: this machine's own, or bookworm where this is no Debian."""
    system = platform.freedesktop_os_release()
    return system.get("VERSION_CODENAME", "") if system["ID"] == "debian" else "bookworm"


def mirror() -> str:
    """Return where packages come from: $MIRROR, or the first archive of this machine's apt; "" when there is none."""
    if platform.freedesktop_os_release()["ID"] != "debian" or not shutil.which("apt-get"):
        return os.environ.get("MIRROR", "")
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    known = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    return os.environ.get("MIRROR") or next(iter(known), "")


def why_not() -> str | None:
    """Say what is missing to make a Debian system here, or None when nothing is."""
    if not is_real_root():
        return "needs the machine's own root, to make a Debian system"
    if not shutil.which("debootstrap"):
        return "needs debootstrap, to make a Debian system"
    return None if mirror() else "needs a Debian mirror: an apt that has one, or its address in MIRROR"


@contextmanager
def made_once(name: str, *recipe: str) -> Iterator[tuple[Path, Path | None]]:
    """Give (PLACE, WORK) for what is kept under `name`: WORK is an empty folder beside it, or None when PLACE is there.

    Whoever is given WORK makes `WORK/made`, which is moved to PLACE when the context ends without an error. `recipe` is
    all that the result depends on. One process at a time makes things; the others wait.
    """
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:16]
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{name}-{digest}"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():
            yield place, None
            return
        with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=folder, ignore_cleanup_errors=True) as work:
            yield place, Path(work)
            Path(work, "made").rename(place)


def debian_root(name: str, packages: Sequence[str], files: Mapping[str, str] = _NO_FILES, *, release: str = "") -> Path:
    """Return the folder of a minimal Debian with `packages`, unpacked and configured; nothing may write to it.

    `files` (path to text) are there when packages are configured, for those that look at their settings then.
    `release` is another Debian release than that of `suite()`.
    Skips the test where none can be made; `RuntimeError` with the end of the log when a package cannot be configured.
    """
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    files = {_DPKG_FILE: _DPKG, **files}
    release = release or suite()
    with made_once(name, release, *sorted(packages), repr(sorted(files.items())), _CONFIGURE) as (place, work):
        if work is not None:
            _bootstrap(work / "made", packages, files, release)
    return place


def _bootstrap(root: Path, packages: Sequence[str], files: Mapping[str, str], release: str) -> None:
    kept = cache() / "packages"
    kept.mkdir(exist_ok=True)
    include = f"--include={','.join(sorted(packages))}"
    fetch = ["debootstrap", "--foreign", "--variant=minbase", f"--cache-dir={kept}", include, release, str(root)]
    fetched = subprocess.run([*fetch, mirror()], capture_output=True, text=True, check=False)
    if fetched.returncode != 0:
        pytest.skip(f"no Debian system: {(fetched.stdout + fetched.stderr).strip().splitlines()[-1]}")
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    done = subprocess.run(["sh", "-euc", _CONFIGURE, "sh", root], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        log = root / "debootstrap/debootstrap.log"
        more = log.read_text()[-3000:] if log.exists() else ""
        raise RuntimeError(f"{done.stdout[-2000:]}{done.stderr[-2000:]}{more}")


class Rooted:
    """A Debian system on a laptop's network, with the laptop's processes and a private copy of `root`'s files."""

    def __init__(self, laptop: Laptop, root: Path) -> None:
        self._laptop = laptop
        self._inside = f"{laptop.folder}/root/system"
        laptop.run("sh", "-ec", _ENTER, "sh", str(laptop.folder), str(root))

    def path(self, inside: str) -> Path:
        """Return where a path of the system is found from here."""
        return self._laptop.path(f"{self._inside}/{inside.lstrip('/')}")

    def execute(self, *argv: str, stdin: str | None = None, env: dict[str, str] | None = None) -> Result:
        """Run a program of the system and return how it ended, with `env` added to its environment."""
        return self._laptop.execute(*self._command(argv, env or {}), stdin=stdin)

    def run(self, *argv: str, check: bool = True, stdin: str | None = None) -> str:
        """Run a program of the system and return its output; with `check` a failure fails the test."""
        done = self.execute(*argv, stdin=stdin)
        assert not check or done.code == 0, f"debian: {' '.join(argv)}: {done.code}\n{done.out}{done.err}"
        return done.out

    def start(self, *argv: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a program of the system and return at once; it ends with the laptop at the latest."""
        return self._laptop.start(*self._command(argv, env or {}))

    def _command(self, argv: Sequence[str], env: dict[str, str]) -> list[str]:
        own = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", **env}
        return ["chroot", self._inside, "env", "-i", *(f"{key}={value}" for key, value in own.items()), *argv]
