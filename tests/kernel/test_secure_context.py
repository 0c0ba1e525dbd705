"""A page of a guest's is a secure context: what Chromium gives no other plain-http page of a network, it has.

The browser runs on the laptop, as its user's would; the pages come from a namespace, a VM, and a neighbour on the LAN.
"""

import json
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.machine import Machine
from tests.kernel.net import FORMS, Laptop, need_own_etc
from tests.kernel.vm import boot

# The frame keeps the page from being loaded, and with that from being printed, until everything has been tried.
PAGE = """<!doctype html><pre></pre><iframe></iframe><script>
const frame = document.querySelector("iframe").contentDocument;
frame.open();
const works = (promise) => promise.then(() => true, () => false);
(async () => {
  const seen = {
    "isSecureContext": window.isSecureContext,
    "serviceWorker": !!navigator.serviceWorker,
    "subtle": !!crypto.subtle,
    "clipboard": !!navigator.clipboard,
    "mediaDevices": !!navigator.mediaDevices,
    "a worker registers": await works((async () => navigator.serviceWorker.register("worker.js"))()),
    "a digest is made": await works((async () => crypto.subtle.digest("SHA-256", new Uint8Array(1)))()),
  };
  document.querySelector("pre").textContent = JSON.stringify(seen);
  frame.close();
})();
</script>
"""
WORKER = "self.addEventListener('fetch', () => {});\n"
ALL = {
    *("isSecureContext", "serviceWorker", "subtle", "clipboard", "mediaDevices"),
    *("a worker registers", "a digest is made"),
}

_QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server"),
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-sync"),
)


@pytest.fixture
def www(tmp_path: Path) -> Path:
    """The folder with the page, for a server of files."""
    folder = tmp_path / "www"
    folder.mkdir()
    (folder / "index.html").write_text(PAGE)
    (folder / "worker.js").write_text(WORKER)
    return folder


@pytest.fixture(scope="module")
def browser() -> str:
    """The program that plays the user's browser."""
    for name in ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found and not is_snap(Path(found).resolve()):
            return found
    pytest.skip("needs Chromium, and not as a snap")


def is_snap(program: Path) -> bool:
    """Tell whether snapd, or a script that calls it, stands for a program: it runs in namespaces of its own choice."""
    with program.open("rb") as file:
        return program.name == "snap" or b"/snap/" in file.read(4096)


def serve(machine: Machine, folder: Path) -> None:
    """Serve the files of a folder on a machine's port 80, until the lab ends."""
    with machine.entered():
        server = ThreadingHTTPServer(("", 80), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    for end in (server.server_close, thread.join, server.shutdown):
        machine.lab.at_exit(end)


def given(laptop: Laptop, browser: str, url: str) -> set[str]:
    """Open the page in the laptop's browser and return what it found that it has."""
    profile = f"--user-data-dir={laptop.folder}/profile"
    done = laptop.execute("timeout", "--kill-after=5", "60", browser, *_QUIET, profile, "--dump-dom", url)
    shown = re.search(r"<pre>(.+)</pre>", done.out)
    assert shown, f"{url}: {done.code}\n{done.out}\n{done.err}"
    seen: dict[str, Any] = json.loads(shown[1])
    return {what for what, has in seen.items() if has}


@pytest.mark.parametrize("form", ["veth-native", "veth-mapped"])
def test_a_guests_page_is_a_secure_context(laptop: Laptop, lan: Machine, browser: str, www: Path, form: str) -> None:
    web = laptop.guest("web", *FORMS[form])
    for machine in (web, lan):
        serve(machine, www)
    assert given(laptop, browser, f"http://{web.address}/") == ALL
    assert given(laptop, browser, f"http://{lan.address}/") == set()


def test_by_its_name_it_is_none(laptop: Laptop, browser: str, www: Path) -> None:
    """A browser trusts addresses of 127/8, and names under localhost, for they cannot lead anywhere else."""
    need_own_etc()
    laptop.env["VMNET_HOSTS_FILE"] = "/etc/hosts"
    web = laptop.guest("web", *FORMS["veth-native"])
    serve(web, www)
    assert given(laptop, browser, f"http://{web.info['hostname']}/") == set()
    assert given(laptop, browser, f"http://{web.address}/") == ALL


def test_so_is_a_vms_page(laptop: Laptop, browser: str) -> None:
    [vm] = boot(laptop, "vm")
    vm.run(f"cat >/www/index.html <<'END'\n{PAGE}END\ncat >/www/worker.js <<'END'\n{WORKER}END")
    assert given(laptop, browser, f"http://{vm.address}/") == ALL
