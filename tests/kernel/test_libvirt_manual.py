"""What the page about libvirt shows, run line by line on a laptop with a real libvirtd; and the templates it names."""

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from tests.kernel.libvirtd import Domain, Libvirtd
from tests.kernel.machine import Machine, wait_until
from tests.kernel.net import Laptop
from tests.kernel.test_hooks import program  # noqa: F401 -- a fixture
from tests.kernel.test_libvirt import devices, shown
from tests.kernel.test_manual import ROOT, replay, shell  # noqa: F401 -- a fixture
from tests.kernel.vm import LIMIT

pytestmark = pytest.mark.root

PAGE = "docs/how-to/libvirt.md"
DISK = "/var/lib/libvirt/images/web.qcow2"
# What nested virtualization lacks is not for this page: qemu finds no KVM, and virt-install takes what there is.
WITHOUT_KVM = "umount /var/cache/libvirt; [ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm"


@pytest.fixture
def libvirt(shell: Laptop, internet: Machine, program: Path) -> Iterator[Libvirtd]:  # noqa: F811
    made = Libvirtd(shell)
    shell.run("sh", "-ec", WITHOUT_KVM)
    with made:
        made.give_python()
        (shell.folder / "bin/vmnet").write_text(f"#!/bin/sh\nexec '{program}' -m vmnet \"$@\"\n")
        shell.run("qemu-img", "create", "-q", "-f", "qcow2", DISK, "64M")
        yield made


def test_the_page_runs_as_it_stands(shell: Laptop, libvirt: Libvirtd) -> None:  # noqa: F811
    for name in ("shop", "mail", "db"):
        Domain(libvirt, name, "")
    blocks = (ROOT / PAGE).read_text().count("```console\n")
    for number in range(blocks):
        replay(shell, PAGE, number, limit=LIMIT)
    assert blocks >= 6
    # That of shop goes when it ends; attach has made one for a domain that does not run.
    assert wait_until(lambda: devices(shell) == {"vmn-web", "vmn-db", "vmn-mail"}, LIMIT)
    assert {one["name"] for one in shell.vmnet("list", "--json").json} == {"web", "shop", "mail", "db"}


@pytest.mark.parametrize("way", ["network", "ethernet"])
def test_the_domain_of_the_templates_starts(shell: Laptop, libvirt: Libvirtd, way: str) -> None:  # noqa: F811
    xml = (files("vmnet") / "templates/libvirt/domain.xml").read_text()
    xml = xml.replace("type='kvm'", "type='qemu'").replace("host-passthrough", "maximum")
    if way == "ethernet":
        xml = re.sub(r"<interface type='network'>.*?</interface>", "", xml, flags=re.DOTALL)
        opened = re.sub(r"<!-- Or by[^<]*(<interface.*?</interface>)\s*-->", r"\1", xml, flags=re.DOTALL)
        assert opened != xml
        xml = opened
    replay(shell, PAGE, 0)
    libvirt.define(xml)
    libvirt.virsh("start", "--paused", "web")
    info = shown(shell, "web")
    assert (info["address"], info["state"], info["device"]) == ("127.1.7.2", "up", "vmn-web")
    libvirt.virsh("destroy", "web")
