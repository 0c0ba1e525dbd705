"""The set-up of a checkout: bin/vmnet, bin/test and bin/setup as they are, on one that needs a single tiny package.

pip runs for real, from a folder in place of an index. What the system lacks is never installed here.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

BIN = Path(__file__).parents[2] / "bin"

# What the tiny vmnet says of how it was started.
MAIN = """
import json, os, site, sys
if sys.flags.no_site:
    site.main()
import tiny
said = {"argv": sys.argv[1:], "cwd": os.getcwd(), "pid": os.getpid(), "stdin": sys.stdin.read(),
        "python": sys.executable, "tiny": tiny.VERSION}
print(json.dumps(said))
sys.exit(42)
"""

# What the tiny pytest says.
PYTEST = """
import json, os, socket, sys
said = {"argv": sys.argv[1:], "cwd": os.getcwd(), "uid": os.getuid(), "pid": os.getpid(),
        "links": [name for _, name in socket.if_nameindex()]}
print(json.dumps(said))
sys.exit(3)
"""


def make_wheel(folder: Path, name: str, version: str, source: str) -> str:
    """Write a wheel with the one module `name` and return its line for a lock."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
    }
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(zipfile.ZipInfo(file), text)  # no time in it: the same bytes each time
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@dataclass(frozen=True)
class Checkout:
    """A checkout in `path` whose packages come from `path`/wheels."""

    path: Path

    @property
    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "VMNET_"))}
        kept.pop("CI", None)
        wheels = (self.path / "wheels").as_uri()
        return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels}

    def run(self, *argv: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command, in the checkout by default, with "hello" on stdin."""
        return subprocess.run(
            argv, cwd=cwd or self.path, env={**self.env, **env}, input="hello", capture_output=True, text=True
        )

    def need(self, version: str) -> None:
        """Make the lock ask for this version of the tiny package."""
        line = make_wheel(self.path / "wheels", "tiny", version, f"VERSION = {version!r}\n")
        (self.path / "requirements.lock").write_text(line)

    @property
    def venv(self) -> Path:
        return self.path / ".venv"

    def is_whole(self) -> bool:
        """Run it as it is: complete, it starts; and nothing is left beside it."""
        done = self.run("bin/vmnet")
        return done.returncode == 42 and done.stderr == "" and not list(self.path.glob(".venv.*"))


def make_checkout(path: Path) -> Checkout:
    shutil.copytree(BIN, path / "bin")
    (path / "wheels").mkdir()
    (path / "src/vmnet").mkdir(parents=True)
    (path / "src/vmnet/__main__.py").write_text(MAIN)
    checkout = Checkout(path)
    checkout.need("1")
    pytest_line = make_wheel(path / "wheels", "pytest", "1", PYTEST)
    (path / "requirements-test.lock").write_text((path / "requirements.lock").read_text() + pytest_line)
    return checkout


@pytest.fixture(scope="module")
def _set_up(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = make_checkout(tmp_path_factory.mktemp("set_up") / "vmnet")
    done = checkout.run("bin/vmnet")
    if "missing on this machine" in done.stderr:
        pytest.skip(f"{done.stderr.splitlines()[0]}: bin/test installs it")
    assert done.returncode == 42, done.stderr
    return checkout


@pytest.fixture
def ready(_set_up: Checkout, tmp_path: Path) -> Checkout:
    """A checkout that is set up, moved away from where that was done."""
    shutil.copytree(_set_up.path, tmp_path / "moved to", symlinks=True)
    return Checkout(tmp_path / "moved to")


@pytest.fixture
def fresh(_set_up: Checkout, tmp_path: Path) -> Checkout:
    """A checkout that is not set up, on a machine that has all system packages."""
    return make_checkout(tmp_path / "fresh")


@pytest.fixture
def foreign(_set_up: Checkout) -> Iterator[Checkout]:
    """A checkout that is not set up and belongs to uid 12345 and gid 12346."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        checkout = make_checkout(Path(folder, "vmnet"))
        for path in [checkout.path, *checkout.path.rglob("*")]:
            os.chown(path, 12345, 12346)
        yield checkout


@pytest.fixture
def small_disk(_set_up: Checkout, tmp_path: Path) -> Iterator[Path]:
    """A folder with 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("start", ["bin/vmnet", "../moved to/bin/vmnet", "{path}/bin/vmnet", "{path}/link", "sh"])
def test_the_command_gets_arguments_stdin_and_folder_and_gives_its_exit_code(ready: Checkout, start: str) -> None:
    (ready.path / "link").symlink_to("bin/vmnet")
    cwd = ready.path / "bin" if start == "sh" else ready.path
    command = ["sh", "vmnet"] if start == "sh" else [start.format(path=ready.path)]
    done = ready.run(*command, "exec", "web", "--", "sh", "-c", "a  b", "", cwd=cwd)
    said = json.loads(done.stdout)
    assert done.returncode == 42
    assert said["argv"] == ["exec", "web", "--", "sh", "-c", "a  b", ""]
    assert said["stdin"] == "hello"
    assert said["cwd"] == str(cwd)
    assert said["python"] == str(ready.venv / "bin/python")


def test_the_command_replaces_the_shell(ready: Checkout) -> None:
    with subprocess.Popen(["bin/vmnet"], cwd=ready.path, env=ready.env, stdin=subprocess.DEVNULL, stdout=-1) as process:
        assert process.stdout
        assert json.loads(process.stdout.read())["pid"] == process.pid


def test_neither_the_folder_nor_the_environment_brings_in_code(ready: Checkout, tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text("raise SystemExit('not mine')")
    assert ready.run("../moved to/bin/vmnet", cwd=ready.path).returncode == 42
    assert ready.run(f"{ready.path}/bin/vmnet", cwd=tmp_path, PYTHONPATH=str(tmp_path)).returncode == 42


def test_what_is_set_up_moves_along_and_stays(ready: Checkout) -> None:
    before = ready.venv.stat()
    assert ready.is_whole()
    assert ready.venv.stat().st_ino == before.st_ino


def test_a_clone_with_other_times_is_recognised_by_content(ready: Checkout) -> None:
    before = ready.venv.stat()
    for name in "requirements.lock", "bin/setup":
        os.utime(ready.path / name, (1, 1))
    assert ready.is_whole()
    assert ready.venv.stat().st_ino == before.st_ino
    assert (ready.venv / "setup").stat().st_mtime == 1


def test_a_changed_list_is_installed_and_nothing_else_stays(ready: Checkout) -> None:
    ready.need("2")
    os.utime(
        ready.path / "requirements.lock", (1, 1)
    )  # older than the last one, as after a checkout of an older commit
    done = ready.run("bin/vmnet")
    assert json.loads(done.stdout)["tiny"] == "2"
    assert "installing the Python packages of requirements.lock" in done.stderr
    assert [path.name for path in ready.venv.glob("lib/python3*/site-packages/tiny*info")] == ["tiny-2.dist-info"]
    assert ready.is_whole()


def test_a_python_that_went_away_is_replaced(ready: Checkout) -> None:
    [python] = [link for link in (ready.venv / "bin").iterdir() if link.is_symlink() and link.readlink().is_absolute()]
    python.unlink()
    python.symlink_to("/usr/bin/python3.10-that-was-removed")
    assert ready.run("bin/vmnet").returncode == 42
    assert ready.is_whole()


def test_the_venv_is_of_the_systems_python_and_its_scripts_know_where_they_are(fresh: Checkout, tmp_path: Path) -> None:
    shim = tmp_path / "python3"
    shim.write_text("#!/bin/sh\nexit 1\n")
    shim.chmod(0o755)
    done = fresh.run("bin/vmnet", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 42
    assert fresh.run(".venv/bin/pip", "--version").returncode == 0
    assert not [path for path in (fresh.venv / "bin").iterdir() if b".venv.new" in path.read_bytes()]


def test_two_at_once_do_it_once(fresh: Checkout) -> None:
    both = [
        subprocess.Popen(
            ["bin/vmnet"],
            cwd=fresh.path,
            env=fresh.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [42, 42], said
    assert sum("installing the Python packages" in text for text in said) == 1
    assert sum("waiting for another set-up" in text for text in said) == 1
    assert fresh.is_whole()


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param("pyvenv.cfg", marks=pytest.mark.long),
        pytest.param("bin/pip", marks=pytest.mark.long),
        "lib/python3*/site-packages/tiny.py",
    ],
)
def test_a_killed_set_up_is_not_taken_for_done(fresh: Checkout, seen: str) -> None:
    with subprocess.Popen(
        ["bin/vmnet"],
        cwd=fresh.path,
        env=fresh.env,
        stdin=subprocess.DEVNULL,
        stdout=-1,
        stderr=-1,
        start_new_session=True,
    ) as process:
        while process.poll() is None and not list(fresh.path.glob(f".venv.new/{seen}")):
            time.sleep(0.001)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    assert not fresh.venv.exists()
    assert fresh.run("bin/vmnet").returncode == 42
    assert fresh.is_whole()


def test_bytes_that_are_not_in_the_list_are_refused(ready: Checkout) -> None:
    make_wheel(ready.path / "wheels", "tiny", "2", "VERSION = 'forged'\n")
    (ready.path / "requirements.lock").write_text(f"tiny==2 --hash=sha256:{'0' * 64}\n")
    done = ready.run("bin/vmnet")
    assert done.returncode == 7
    assert done.stdout == ""
    assert "vmnet: could not make" in done.stderr
    assert "hint: run this again" in done.stderr
    assert not list(ready.path.glob(".venv.*"))
    ready.need("1")
    assert ready.is_whole()  # the one from before


def test_a_full_disk_is_said_and_leaves_nothing(small_disk: Path) -> None:
    checkout = make_checkout(small_disk / "vmnet")
    done = checkout.run("bin/vmnet")
    assert done.returncode == 7
    assert "No space left" in done.stderr
    assert "vmnet: could not make" in done.stderr
    assert not list(checkout.path.glob(".venv*"))


def test_a_read_only_checkout_is_said_unless_it_is_set_up(ready: Checkout, tmp_path: Path) -> None:
    if subprocess.run(["mount", "--bind", ready.path, ready.path], capture_output=True).returncode != 0:
        pytest.skip("nothing can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", ready.path], check=True)
        assert ready.run("bin/vmnet").returncode == 42
        subprocess.run(["mount", "-o", "remount,bind,rw", ready.path], check=True)
        ready.need("2")
        subprocess.run(["mount", "-o", "remount,bind,ro", ready.path], check=True)
        done = ready.run("bin/vmnet")
    finally:
        subprocess.run(["umount", ready.path], check=True)
    assert done.returncode == 7
    assert f"vmnet: cannot write to {ready.path}" in done.stderr


def test_an_old_python_is_said(fresh: Checkout, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text(
        textwrap.dedent("""\
            #!/bin/sh
            # Python as it is, but for its age.
            case $2 in
            -c) exec /usr/bin/python3 -I -c "import sys; sys.version_info = (3, 10, 12); $3" ;;
            *) echo Python 3.10.12 ;;
            esac
        """)
    )
    old.chmod(0o755)
    done = fresh.run("bin/vmnet", VMNET_PYTHON=str(old))
    assert done.returncode == 7
    assert f"vmnet: vmnet needs Python 3.11 or newer; {old} is Python 3.10.12" in done.stderr


@pytest.mark.parametrize("name", ["vmnet", "test"])
def test_without_terminal_and_yes_what_is_missing_is_said_and_not_installed(fresh: Checkout, name: str) -> None:
    nft = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin:/bin")
    assert nft
    hide = f'mount --bind /dev/null "{os.path.realpath(nft)}" && exec "$@"'
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("nothing can be mounted here")
    done = fresh.run("unshare", "--mount", "sh", "-c", hide, "sh", f"bin/{name}", "--version")
    assert done.returncode == 7
    assert "vmnet: missing on this machine: nftables\n" in done.stderr
    assert "hint: --yes as the first argument" in done.stderr
    assert not fresh.venv.exists()


@pytest.mark.root
def test_behind_sudo_the_venv_belongs_to_the_caller(fresh: Checkout) -> None:
    done = fresh.run("bin/vmnet", SUDO_UID="12345", SUDO_GID="12346")
    assert done.returncode == 42, done.stderr
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in [fresh.venv, *fresh.venv.rglob("*")]} == {
        (12345, 12346)
    }


@pytest.mark.root
def test_a_checkout_and_its_venv_belong_to_one_user_whoever_runs_it(foreign: Checkout) -> None:
    def owners() -> set[tuple[int, int]]:
        return {(path.lstat().st_uid, path.lstat().st_gid) for path in foreign.path.rglob("*")}

    done = foreign.run("bin/vmnet")
    assert done.returncode == 42, done.stderr
    assert owners() == {(12345, 12346)}

    done = foreign.run("bin/test", "tests/unit")
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["argv"][:3] == ["-n", "auto", "tests/unit"]
    assert owners() == {(12345, 12346)}

    user = ["setpriv", "--reuid=12345", "--regid=12346", "--clear-groups"]
    done = foreign.run(*user, "bin/test", "tests/unit", "-k", "a b", HOME="/")
    if "refuses an ordinary user" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-2])
    said = json.loads(done.stdout)
    assert done.returncode == 3
    assert said["argv"] == ["-n", "auto", "tests/unit", "-k", "a b"]
    assert said["cwd"] == str(foreign.path)
    assert said["uid"] == 0
    assert said["links"] == ["lo"]
    assert said["pid"] < 10
