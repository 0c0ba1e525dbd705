"""Ordinary users of the laptop: they run vmnet, or send whatever they like to its server.

Records, run folder, settings and names of such a laptop are in its own /run and /etc, where users can get at them, and
so are vmnet and its Python, whatever the rights of the folder that this checkout lies in.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from tests.kernel.net import Laptop, Result, need_own_etc

GROUP = 990
USERS = range(4201, 4210)
"""Those who have an account."""
_CHECKOUT = Path(__file__).parents[2]
_PYTHON, _MAIN = "/run/venv/bin/python", "/run/checkout/src/vmnet/__main__.py"


def let_users_in(laptop: Laptop) -> None:
    """Put all that users need where they get at it, make the group, and start a server."""
    need_own_etc()
    laptop.run("groupadd", "--gid", str(GROUP), "vmnet")
    with laptop.path("/etc/passwd").open("a") as file:
        file.writelines(f"u{uid}:x:{uid}:{uid}::/:/bin/sh\n" for uid in USERS)
    for name, source in (("checkout", _CHECKOUT), ("venv", Path(sys.prefix))):
        laptop.run("mkdir", f"/run/{name}")
        laptop.run("mount", "--bind", str(source), f"/run/{name}")
    laptop.env |= {
        "VMNET_STATE_DIR": "/run/state",
        "VMNET_RUN_DIR": "/run/vmnet",
        "VMNET_CONFIG": "/etc/vmnet.toml",
        "VMNET_HOSTS_FILE": "/run/hosts",
    }
    laptop.run("touch", "/run/hosts")
    laptop.env.pop("PYTHONPATH")
    laptop.programs = [_PYTHON, "-IS", _MAIN]
    laptop.vmnet("carve")
    laptop.start_server()


class User:
    """A user of that uid; a `member` is in the group."""

    def __init__(self, laptop: Laptop, uid: int, *, member: bool = True) -> None:
        self.laptop = laptop
        groups = f"--groups={GROUP}" if member else "--clear-groups"
        self.become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", groups, "--", "env", "--chdir=/"]

    def run(self, *argv: str) -> Result:
        """Run a program."""
        return self.laptop.execute(*self.become, *argv)

    def vmnet(self, *args: str, check: bool = True, env: dict[str, str] | None = None) -> Result:
        """Run vmnet; with `check` another exit code than 0 fails the test."""
        done = self.laptop.execute(*self.become, *self.laptop.call, *args, env=env)
        assert not check or done.code == 0, f"vmnet {' '.join(args)}: {done.code}\n{done.out}{done.err}"
        return done

    def start(self, *argv: str) -> "subprocess.Popen[str]":
        """Start a program."""
        return self.laptop.start(*self.become, *argv)


class Hostile:
    """A process of a user's that sends the server what it is told to; a context manager that ends it."""

    def __init__(self, user: User) -> None:
        code = "import sys; sys.path.insert(0, '/run/checkout'); from tests.kernel.hostile import main; main()"
        self._process = user.start(_PYTHON, "-I", "-c", code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def do(self, deed: str, **words: Any) -> Any:
        """Have it do something, see tests.kernel.hostile; return what it says of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"deed": deed, **words}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, self._process.stderr and self._process.stderr.read()
        return json.loads(line)

    def send(self, data: bytes, *kinds: str, patience: float = 20.0) -> bytes:
        """Have it send one message with descriptors of those kinds; return all that comes back."""
        said = self.do("send", data=data.hex(), kinds=kinds, patience=patience)
        return bytes.fromhex(said)


def memory(pid: int) -> int:
    """Return how many bytes a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
