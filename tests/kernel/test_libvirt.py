"""Domains of a real libvirtd (`libvirtd.py`) on vmnet, through all that can happen to them."""

from collections.abc import Iterator

import pytest

from tests.kernel.libvirtd import Domain, Libvirtd, ethernet
from tests.kernel.net import Laptop

pytestmark = pytest.mark.root


@pytest.fixture
def libvirt(laptop: Laptop) -> Iterator[Libvirtd]:
    with Libvirtd(laptop) as running:
        yield running


def test_a_domain_on_a_tap_that_was_created_before_and_no_hooks(laptop: Laptop, libvirt: Libvirtd) -> None:
    [made] = laptop.vmnet("create", "web", "--kind", "tap", "--json").json
    web = Domain(libvirt, "web", ethernet(made["device"], made["mac"]))
    for _ in range(2):
        web.start()
        assert web.http() == f"web {made['shadow']}"
        libvirt.virsh("destroy", "web")
    assert web.state() == "shut off"
    assert made["device"] in laptop.links()


def test_hooks_of_anybody_are_called(laptop: Laptop, libvirt: Libvirtd) -> None:
    [made] = laptop.vmnet("create", "web", "--kind", "tap", "--json").json
    calls = laptop.path("/run/calls")
    for kind in ("qemu", "network"):
        hook = libvirt.hooks / f"{kind}.d" / "record"
        hook.parent.mkdir()
        hook.write_text(f'#!/bin/sh\necho {kind} "$*" >>/run/calls\nexec cat >/dev/null\n')
        hook.chmod(0o755)
    libvirt.reload()
    web = Domain(libvirt, "web", ethernet(made["device"], made["mac"]))
    web.start()
    libvirt.virsh("destroy", "web")
    libvirt.virsh("net-start", "default")
    libvirt.virsh("net-destroy", "default")
    assert calls.read_text().splitlines() == [
        *(f"qemu web {step} begin -" for step in ("prepare", "start", "started")),
        *(f"qemu web {step} end -" for step in ("stopped", "release")),
        *(f"network default {step} begin -" for step in ("start", "started")),
        "network default stopped end -",
    ]
