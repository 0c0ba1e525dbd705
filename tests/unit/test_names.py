"""Guest names and the names of their devices: the rule, its refusals, and that no two guests share a device."""

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmnet.model import UsageError, check_name, device_name

LETTERS = string.ascii_lowercase + string.digits
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
LONG_NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{10,61}[a-z0-9]", fullmatch=True)


@pytest.mark.parametrize("name", ["a", "7", "web", "a-b", "a--b", "0-0", "x" * 63, "xn--bcher-kva"])
def test_a_label_is_a_name(name: str) -> None:
    assert check_name(name) == name


NO_NAMES = [
    "", " ", "-", "-a", "a-", "a_b", "A", "aB", "a.b", "a b", "a\n", "\na", "a\0", "ä", "ａ", "٣", "a/b", "../a", ".",
    "..", "a;b", "$(a)", "a'b", 'a"b', "`a`", "a%b", "*", "\x1b[2J", "\udcff", "--json", "\u200bweb", "x" * 64,
    "x" * 65536,
]  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES, ids=[ascii(name)[:20] for name in NO_NAMES])
def test_anything_else_is_refused_with_the_rule(name: str) -> None:
    with pytest.raises(UsageError, match="is not a guest name") as caught:
        check_name(name)
    assert len(caught.value.message) < 120
    assert caught.value.message.isprintable()
    assert "1 to 63 of a-z, 0-9 and -" in caught.value.hint


@given(st.text(LETTERS + "-_. A/é\n", max_size=70))
@example("a" * 63 + "-")
def test_the_rule_is_the_one_that_is_written_down(text: str) -> None:
    right = 1 <= len(text) <= 63 and set(text) <= {*LETTERS, "-"} and text[0] != "-" and text[-1] != "-"
    if right:
        assert check_name(text) == text
    else:
        with pytest.raises(UsageError):
            check_name(text)


@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,9}[a-z0-9])?", fullmatch=True))
def test_a_short_name_is_in_its_device_name_whole(name: str) -> None:
    assert device_name(name) == f"vmn-{name}"


@given(LONG_NAMES)
def test_a_long_name_is_shortened_to_eleven_characters_with_an_underscore(name: str) -> None:
    device = device_name(name)
    assert len(device) == 15
    assert device.startswith("vmn-")
    assert "_" in device[4:]
    assert set(device) <= {*string.ascii_letters, *string.digits, "-", "_"}


@given(NAMES)
def test_a_device_name_is_one_that_the_kernel_takes(name: str) -> None:
    device = device_name(name)
    assert 0 < len(device.encode()) <= 15
    assert not set(device) & set("/: \t\n%")


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("web", "vmn-web"),
        ("a" * 11, "vmn-aaaaaaaaaaa"),
        ("a" * 12, "vmn-aa_3vwKeH9c"),
        ("kubernetes-node-000001", "vmn-ku_AXQDueKr"),
        ("x" * 63, "vmn-xx_YOaIswZW"),
    ],
)
def test_a_device_name_stays_the_same_from_version_to_version(name: str, device: str) -> None:
    assert device_name(name) == device


@pytest.mark.parametrize("form", ["kubernetes-node-{:06}", "{:06}-example", "vm-{0:06}-{0:06}", "{:x>63}"])
def test_a_hundred_thousand_names_of_one_form_have_a_device_each(form: str) -> None:
    devices = {device_name(form.format(number)) for number in range(100_000)}
    assert len(devices) == 100_000
