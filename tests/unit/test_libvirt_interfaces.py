"""What is read of a domain's interfaces, and what gives it others: laws over any domain."""

from xml.etree import ElementTree
from xml.sax.saxutils import escape

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_libvirt import sample
from vmnet.libvirt.element import libvirt_interface
from vmnet.libvirt.interfaces import Domain, Gift, plan_adopt, plan_attach, read_interfaces, replacement
from vmnet.model import Block, Lease
from vmnet.store import DomainRecord

UUID = "7f000102-0000-4000-8000-000000000003"
SOURCES = (
    "<source network='default'/>",
    "<source network='default' portgroup='x'/><virtualport type='openvswitch'/><target dev='vnet3'/>",
    "<source network='vmnet'/>",
    "<source network='other'/><model type='e1000e'/><driver queues='4'/><mtu size='1400'/>",
    """<source network='default'/><model type='virtio'/><boot order='1'/>
    <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>""",
)
NICS = st.one_of(
    st.sampled_from(SOURCES).map(lambda inner: ("network", inner)),
    st.sampled_from(["a", "web", "web-2"]).map(lambda name: ("ethernet", f"<target dev='vmn-{name}' managed='no'/>")),
    st.just(("ethernet", "<target dev='tap0' managed='no'/>")),
    st.just(("user", "")),
)


def mac(number: int) -> str:
    return f"52:54:00:00:00:{number:02x}"


def document(name: str, nics: list[tuple[str, str]]) -> str:
    inner = "".join(
        f"<interface type='{type_}'><mac address='{mac(number)}'/>{inner}</interface>"
        for number, (type_, inner) in enumerate(nics)
    )
    return f"<domain><name>{escape(name)}</name><uuid>{UUID}</uuid><devices>{inner}</devices></domain>"


def told(name: str, live: str | None, config: str | None) -> Domain:
    return Domain.read({"name": name, "uuid": UUID, "state": "running", "live": live, "config": config})


def with_interface(xml: str, interface: str) -> str:
    return xml.replace("</devices>", f"{interface}</devices>")


def given_by(xml: str | None, gift: Gift, *, wanted: bool) -> str | None:
    """Return a domain's XML after a gift, as libvirt would have it."""
    if xml is None or not wanted:
        return xml
    lease = Lease(
        name=gift.guest, block=Block(0), kind="tap", mode="mapped", mac=gift.like.mac if gift.like else mac(255),
        mtu=1500, owner=0, queues=1, netns=None, wish="up", created="",
    )  # fmt: skip
    if not gift.instead:
        return with_interface(xml, libvirt_interface(lease))
    assert gift.like
    root = ElementTree.fromstring(xml)
    devices = root.find("devices")
    assert devices is not None
    for one in list(devices):
        found = one.find("mac")
        if found is not None and found.get("address") == gift.like.mac:
            devices.remove(one)
    return with_interface(
        ElementTree.tostring(root, encoding="unicode").replace("<devices />", "<devices></devices>"),
        replacement(xml, gift.like.mac, lease.device),
    )


def after(domain: Domain, gift: Gift) -> Domain:
    live = given_by(domain.live_xml, gift, wanted=gift.live)
    return told(domain.name, live, given_by(domain.config_xml, gift, wanted=gift.config))


DOMAINS = st.builds(
    lambda name, nics, more, where: told(
        name,
        document(name, nics + more) if "live" in where else None,
        document(name, nics) if "config" in where else None,
    ),
    st.sampled_from(["web", "Web & Co", "x"]),
    st.lists(NICS, max_size=3, unique_by=lambda one: one[1] if one[0] == "ethernet" else object()),
    st.lists(st.sampled_from([("network", SOURCES[0])]), max_size=1),
    st.sampled_from([("live",), ("config",), ("live", "config")]),
)


@given(DOMAINS, st.sampled_from(["web", "web-2", "another"]))
def test_a_domain_that_was_attached_needs_no_more(domain: Domain, guest: str) -> None:
    gift = plan_attach(domain, guest)
    whole = after(domain, gift)
    assert [one.guest for one, _, _ in whole.ours].count(guest) == 1
    again = plan_attach(whole, guest)
    assert (again.live, again.config) == (False, False)
    # All that was there is there as it was.
    for one in (*domain.live, *domain.config):
        assert one in (*whole.live, *whole.config)


@given(DOMAINS, st.booleans())
def test_a_domain_that_was_adopted_is_left(domain: Domain, instead: bool) -> None:
    gifts = plan_adopt(domain, "default", "guest", instead=instead)
    whole = domain
    for gift in gifts:
        whole = after(whole, gift)
    assert plan_adopt(whole, "default", "guest", instead=instead) == [] or (instead and not gifts)
    if domain.ours or not domain.is_on("default"):
        assert gifts == []
    if instead and not domain.ours:
        assert not any(one.network == "default" for one in whole.config)
        assert {one.mac for one in whole.config} == {one.mac for one in domain.config}
        assert whole.live == domain.live
    elif gifts:
        assert [one for one in whole.config if not one.is_ours] == list(domain.config)


def test_what_takes_the_place_of_another_is_the_same_to_the_guest() -> None:
    xml = document("web", [("network", SOURCES[3]), ("network", SOURCES[4])])
    new = ElementTree.fromstring(replacement(xml, mac(1), "vmn-web"))
    assert new.attrib == {"type": "ethernet"}
    assert [one.tag for one in new] == ["mac", "model", "boot", "address", "target"]
    assert {one.tag: one.attrib for one in new} == {
        "mac": {"address": mac(1)},
        "model": {"type": "virtio"},
        "boot": {"order": "1"},
        "address": {"type": "pci", "domain": "0x0000", "bus": "0x01", "slot": "0x00", "function": "0x0"},
        "target": {"dev": "vmn-web", "managed": "no"},
    }


def test_a_guest_that_its_device_does_not_tell_is_known_by_its_record() -> None:
    xml = document("web", [("network", SOURCES[2]), ("network", SOURCES[2])])
    records = {"shop": DomainRecord("shop", UUID, mac(0), "web", made=True, gone=None)}
    domain = told("web", xml, xml).known(records, lambda _: None)
    assert [(one.guest, live, config) for one, live, config in domain.ours] == [("shop", True, True), ("", True, True)]
    there = plan_attach(domain, "shop")
    assert (there.live, there.config) == (False, False)


def test_a_recorded_domain_is_read() -> None:
    [read] = read_interfaces(sample("qemu-prepare-begin").decode())
    assert (read.type, read.is_ours, read.network) == ("network", False, "vmnet-open")
