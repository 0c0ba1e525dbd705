"""What cloud-init is told: right values, in YAML that nothing in a name, a domain or a MAC can bend."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnet.cloudinit import DOCUMENTS, render
from vmnet.ipam import guest_mac
from vmnet.model import POOL_BLOCKS, Block, Conflict, HostLacks, Kind, Lease
from vmnet.plan import Plane
from vmnet.seed import write_seed
from vmnet.settings import Settings

LEASE = Lease(
    name="myvm", block=Block(0), kind="tap", mode="mapped", mac=guest_mac(Block(0)), mtu=1500, owner=0, queues=1,
    netns=None, wish="up", created="2026-11-21T09:00:00Z",
)  # fmt: skip
NETWORK = """\
version: 2
ethernets:
  eth0:
    match:
      macaddress: "02:76:7f:01:00:02"
    dhcp4: false
    dhcp6: false
    accept-ra: false
    link-local: []
    addresses:
      - "247.1.0.2/30"
    routes:
      - to: "0.0.0.0/0"
        via: "247.1.0.1"
    nameservers:
      addresses:
        - "247.1.0.1"
      search:
        - "vmnet.internal"
"""

# Block style of YAML, each text between double quotes with nothing in it that would mean anything there.
LINE = re.compile(r'#.*|( {2})*(- )?([a-z0-9-]+:( (?=.))?)?("[a-z0-9.:/-]+"|true|false|\[\]|\d+)?', re.IGNORECASE)

LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
LEASES = st.builds(
    LEASE._replace,
    name=LABELS | st.sampled_from(["null", "no", "y", "1e3", "0x10", "22", "on"]),
    block=st.builds(Block, st.integers(0, POOL_BLOCKS - 1)),
    mac=st.from_regex(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}", fullmatch=True),
    mtu=st.integers(576, 65535),
)
SETTINGS = st.builds(
    Settings()._replace,
    domain=st.lists(LABELS, min_size=1, max_size=2).map(".".join),
    plane=st.builds(Plane()._replace, shadow=st.integers(240, 254)),
)


def test_a_guest_is_told_its_address_way_out_and_names() -> None:
    assert render(LEASE, Settings()) == {
        "network-config": NETWORK,
        "meta-data": '# made by vmnet for myvm\ninstance-id: "myvm-20261121T090000Z"\nlocal-hostname: "myvm"\n',
        "user-data": '#cloud-config\nhostname: "myvm"\nfqdn: "myvm.vmnet.internal"\n',
    }


def test_an_mtu_is_told_where_it_is_not_the_common_one() -> None:
    told = render(LEASE._replace(mtu=1400), Settings())["network-config"]
    assert told.replace("    mtu: 1400\n", "", 1) == NETWORK


@given(lease=LEASES, settings=SETTINGS)
def test_each_text_is_quoted(lease: Lease, settings: Settings) -> None:
    documents = render(lease, settings)
    assert tuple(documents) == DOCUMENTS
    for text in documents.values():
        assert text.endswith("\n")
        assert [line for line in text.splitlines() if not LINE.fullmatch(line)] == []
    assert f'"{lease.name}"' in documents["meta-data"]
    assert f'"{lease.name}.{settings.domain}"' in documents["user-data"]
    assert f'"{lease.mac}"' in documents["network-config"]
    assert f'"{settings.plane.shadow}.' in documents["network-config"]


def test_a_guest_made_anew_is_another_instance() -> None:
    lives = [LEASE, LEASE._replace(created="2026-11-21T09:00:01Z"), LEASE._replace(name="other"), LEASE]
    ids = [render(life, Settings())["meta-data"] for life in lives]
    assert len(set(ids)) == 3
    assert ids[0] == ids[3]


@pytest.mark.parametrize("kind", ["veth", "tun"])
def test_what_is_no_vm_is_refused(kind: Kind) -> None:
    mac = None if kind == "tun" else LEASE.mac
    with pytest.raises(Conflict, match=f"myvm is a {kind}") as caught:
        render(LEASE._replace(kind=kind, mac=mac), Settings())
    assert caught.value.hint


def test_without_a_program_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostLacks, match="genisoimage, mkisofs, xorriso, cloud-localds") as caught:
        write_seed(tmp_path / "seed.iso", render(LEASE, Settings()), (0, 0))
    assert "install xorriso" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
