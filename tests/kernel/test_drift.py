"""Whatever others do to the host or to a guest, `plan` shows it, `list` does not call it up, and `up` heals it.

Each row of the tables is one such deed. After it, a guest that it was not about has its connection still, and after
`up` all guests answer the host and reach the internet.
"""

import fcntl
import os
from typing import Any

import pytest

from tests.kernel.drifts import ALL, DEVICE, HOST, INSIDE, OPENED, TUNSETOWNER, TUNSETPERSIST, VETH, Drift, Scene
from tests.kernel.net import Lab, Laptop, need_own_etc, why_no_tap
from tests.kernel.warm import Warm

CONFLICT = 4


def _cases(drifts: list[Drift], forms: tuple[str, ...]) -> list[Any]:
    """Return each drift with each guest it can be done to; one of these, in turn, is for every run."""
    cases = []
    for number, drift in enumerate(drifts):
        possible = [form for form in forms if form in drift.forms]
        for place, form in enumerate(possible):
            marks = () if place == number % len(possible) else pytest.mark.long
            cases.append(pytest.param(form, drift, id=f"{form}-{drift.name}", marks=marks))
    return cases


def _skip_unless_possible(form: str) -> None:
    if form in OPENED and (reason := why_no_tap()):
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("form", "drift"), [*_cases(HOST, ("veth-native",)), *_cases(DEVICE, ALL), *_cases(INSIDE, VETH)]
)
def test_drift_is_seen_and_healed(form: str, drift: Drift, warm: Warm, lab: Lab) -> None:
    _skip_unless_possible(form)
    scene = Scene(warm, lab, form)
    drift.do(scene)
    scene.sees(drift.state)
    if drift not in HOST:
        scene.talk.goes_on()
    scene.heals()


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("value", [0, 2])
def test_the_reverse_path_filter_of_a_device_is_anybodys(form: str, value: int, warm: Warm, lab: Lab) -> None:
    """Udev and systemd-sysctl write their own on each new device: it is no drift, and nothing depends on it."""
    _skip_unless_possible(form)
    scene = Scene(warm, lab, form)
    key = f"ipv4/conf/{scene.info['device']}/rp_filter"
    assert lab.laptop.sysctl(key) == "1"
    lab.laptop.sysctl(key, value)
    assert scene.state_of("g")["state"] == "up"
    plan = scene.vmnet("plan", check=False)
    assert (plan.code, plan.out) == (0, "")
    assert scene.alive.work(scene.info)
    # What else is healed on the device leaves it alone, too.
    lab.laptop.sysctl(key.replace("rp_filter", "forwarding"), 0)
    scene.heals()
    assert lab.laptop.sysctl(key) == str(value)


@pytest.mark.parametrize("form", ALL)
def test_all_drift_at_once_is_healed(form: str, warm: Warm, lab: Lab) -> None:
    _skip_unless_possible(form)
    scene = Scene(warm, lab, form)
    scene.do_all()
    scene.sees("degraded")
    scene.heals()


def test_what_the_system_calls_protocols_and_groups_is_no_drift(laptop: Laptop, warm: Warm) -> None:
    """nft lists by the names of these files, if it may: a package that brings or takes one must not change the wish."""
    need_own_etc()
    files = {"/etc/protocols": "tcp 6 TCP\nudp 17 UDP\n", "/etc/iproute2/group": "32001 mine\n32002 yours\n"}
    for name in files:
        laptop.path(name).parent.mkdir(exist_ok=True)
        laptop.path(name).write_text("")
    warm.vmnet(laptop, "create", "web", "--kind", "veth")
    for name, text in files.items():
        laptop.path(name).write_text(text)
    assert warm.vmnet(laptop, "plan", "--json").json == []


def test_a_lost_note_of_how_the_host_was_is_made_up(warm: Warm, lab: Lab) -> None:
    """Nothing shows it but `restore`, which has to guess then."""
    before = lab.laptop.snapshot()
    scene = Scene(warm, lab, "veth-native")
    (lab.laptop.folder / "run/found.json").unlink()
    scene.heals()
    scene.vmnet("delete", "--all")
    scene.vmnet("restore")
    after = lab.laptop.snapshot()
    # It was off before, and nothing is left that says so.
    forwarding = {key: after[key] for key in before if "forwarding" in key or "ip_forward" in key}
    assert {**after, **forwarding} == {**before, **forwarding}


@pytest.mark.parametrize("form", VETH)
def test_a_namespace_of_ours_that_is_deleted_is_made_again(form: str, warm: Warm, lab: Lab) -> None:
    scene = Scene(warm, lab, form)
    scene.laptop.run("ip", "netns", "del", "g")
    scene.sees("degraded")
    scene.talk.goes_on()
    scene.heals()


def _fails_alone(scene: Scene, name: str, words: str) -> None:
    """Assert that `up` heals all others, and says in words what is wrong with that one guest."""
    assert scene.state_of(name)["state"] in ("degraded", "down")
    scene.talk.goes_on()
    scene.laptop.ip("link set vmn-bystander mtu 1400", "link set vmn-bystander mtu 1400")
    assert scene.state_of("bystander")["state"] == "degraded"
    failed = scene.vmnet("up", check=False)
    assert failed.code in (1, CONFLICT)
    assert words in failed.err
    assert "hint: " in failed.err
    assert scene.state_of(name)["state"] in ("degraded", "down")
    assert scene.state_of("bystander")["state"] == "up"
    scene.talk.goes_on()


@pytest.mark.parametrize("form", VETH)
def test_a_namespace_that_is_not_the_guests_is_never_entered(form: str, warm: Warm, lab: Lab) -> None:
    scene = Scene(warm, lab, form)
    scene.laptop.run("ip", "netns", "del", "g")
    scene.laptop.run("ip", "netns", "add", "g")

    def shown() -> list[str]:
        looks = ("-d link", "addr", "route show table all", "neigh")
        return [scene.laptop.run("ip", "-n", "g", *look.split()) for look in looks]

    before = shown()
    _fails_alone(scene, "g", "another network namespace")
    assert shown() == before
    scene.vmnet("delete", "g")
    assert shown() == before


# Takes numbers of inodes until the freed one comes again, and puts that namespace in its place.
SAME_NUMBER = """
number=$(stat -Lc %i /run/netns/g); ip netns del g
for i in $(seq 300); do
  ip netns add x$i
  [ "$(stat -Lc %i /run/netns/x$i)" = "$number" ] || continue
  touch /run/netns/g; mount --bind /run/netns/x$i /run/netns/g; exit 0
done
exit 1
"""


@pytest.mark.parametrize("owned", [True, False], ids=["owned", "premade"])
def test_a_namespace_that_got_the_number_of_the_guests_is_not_the_guests(owned: bool, warm: Warm, lab: Lab) -> None:
    laptop = lab.laptop
    for _ in range(10):
        if not owned:
            laptop.run("ip", "netns", "add", "g")
        warm.vmnet(laptop, "create", "g", "--netns", "g")
        if laptop.execute("sh", "-c", SAME_NUMBER).code == 0:
            break
        # Whoever makes a namespace of any kind on this machine may have been the one to get it.
        warm.vmnet(laptop, "delete", "g")
        laptop.run("ip", "-all", "netns", "del")
    else:
        pytest.skip("the kernel has not given the number of the namespace again")
    shown = laptop.run("ip", "-n", "g", "-d", "addr")
    assert warm.vmnet(laptop, "list", "--json").json[0]["state"] == "down"
    failed = warm.vmnet(laptop, "up", check=False)
    assert failed.code == CONFLICT
    assert "another network namespace" in failed.err
    warm.vmnet(laptop, "delete", "g")
    assert laptop.run("ip", "-n", "g", "-d", "addr") == shown


def test_a_namespace_of_others_that_is_gone_is_missed(warm: Warm, lab: Lab) -> None:
    scene = Scene(warm, lab, "veth-native")
    scene.laptop.run("ip", "netns", "add", "pre")
    scene.vmnet("create", "kept", "--netns", "pre")
    scene.laptop.run("ip", "netns", "del", "pre")
    _fails_alone(scene, "kept", "is gone")
    assert not scene.laptop.path("/run/netns/pre").exists()
    scene.laptop.run("ip", "netns", "add", "pre")
    _fails_alone(scene, "kept", "another network namespace")
    scene.vmnet("create", "kept", "--netns", "pre")
    scene.heals()


def test_a_device_that_others_made_their_own_is_left_alone(warm: Warm, lab: Lab) -> None:
    scene = Scene(warm, lab, "veth-native")
    scene.ip("link set {device} alias mine")
    shown = scene.laptop.run("ip", "-d", "addr", "show", "dev", "vmn-g")
    _fails_alone(scene, "g", "not ours")
    assert scene.laptop.run("ip", "-d", "addr", "show", "dev", "vmn-g") == shown
    scene.ip("link set {device} alias ''")
    scene.heals()


@pytest.mark.parametrize("form", OPENED)
@pytest.mark.parametrize(("request_", "value"), [(TUNSETPERSIST, 0), (TUNSETOWNER, 1234)], ids=["persist", "owner"])
def test_what_its_holder_did_to_a_tap_is_healed_when_that_ends(
    form: str, request_: int, value: int, warm: Warm, lab: Lab
) -> None:
    _skip_unless_possible(form)
    scene = Scene(warm, lab, form)
    held = os.dup(scene.alive.wire(scene.info))
    try:
        fcntl.ioctl(held, request_, value)
        scene.sees("degraded")
        _fails_alone(scene, "g", "another program")
        assert scene.laptop.ping(scene.guest.address)
    finally:
        os.close(held)
        scene.alive.stop("g")
    scene.heals()
