"""Where vmnet keeps things, and how it is set up: the environment and one TOML file."""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vmnet.ipam import Pool
from vmnet.model import USUAL_MTU, NotPermitted, UsageError
from vmnet.plan import Plane

_FOLDERS = {"darwin": ("/var/db/vmnet", "/var/run/vmnet")}  # hier(7)
_DOMAIN = re.compile(r"(?=.{1,180}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")


def backend(environment: Mapping[str, str] | None = None) -> str:
    """Return which system vmnet acts on: VMNET_PLATFORM, else this one. To vmnet FreeBSD is as macOS, `darwin`."""
    variables = os.environ if environment is None else environment
    name = variables.get("VMNET_PLATFORM") or sys.platform
    return "darwin" if name.startswith("freebsd") else name


class Paths(NamedTuple):
    """The folders and files of vmnet; `hosts` is None where no hosts file is to be kept."""

    state: Path
    run: Path
    config: Path
    hosts: Path | None

    @property
    def answers(self) -> Path:
        """The folder of what dnsmasq reads."""
        return self.run / "dns"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Paths":
        """Return the paths that the VMNET_* variables name, or their defaults."""
        variables = os.environ if environment is None else environment
        hosts = variables.get("VMNET_HOSTS_FILE", "/etc/hosts")
        state, run = _FOLDERS.get(backend(variables), ("/var/lib/vmnet", "/run/vmnet"))
        return cls(
            state=Path(variables.get("VMNET_STATE_DIR") or state),
            run=Path(variables.get("VMNET_RUN_DIR") or run),
            config=Path(variables.get("VMNET_CONFIG") or "/etc/vmnet/config.toml"),
            hosts=Path(hosts) if hosts else None,
        )


class Settings(NamedTuple):
    """What the file of settings says; docs/reference/settings.md says what each of them means."""

    domain: str = "vmnet.internal"
    mtu: int = USUAL_MTU
    alias_budget: int = 254
    user_guests: int = 64
    guard_forwarding: bool = True
    libvirt_grace: float = 7
    pool: Pool = Pool()
    plane: Plane = Plane()


def load_settings(path: Path) -> Settings:
    """Return the settings in the TOML file at `path`; a missing file means all defaults.

    Raises UsageError naming the file, the key and the value for an unknown key or a bad value, NotPermitted for a
    file that the caller may not read.
    """
    values = _read(path)
    for key, value in values.items():
        if key not in _RULES:
            raise UsageError(f"{path}: there is no setting {key!r}", hint=f"there are {', '.join(KEYS)}")
        is_right, wanted = _RULES[key]
        if not is_right(value):
            raise _bad(path, key, value, wanted)
    plane = Plane(**{key: values.pop(key) for key in _PLANE_KEYS if key in values})
    if plane.group_mapped == plane.group_native:
        raise _bad(path, "group_native", plane.group_native, "another group than group_mapped")
    pool = _pool(path, values.pop("pool", ()), values.pop("reserved", ()))
    return Settings(**values, pool=pool, plane=plane)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path, path.read_text)
    except FileNotFoundError:
        return {}


def read_toml(name: str | Path, read: Callable[[], str]) -> dict[str, Any]:
    """Return what the text that `read` returns says; refusals call it `name`.

    Raises UsageError, NotPermitted, and FileNotFoundError where there is none.
    """
    try:
        text = read()
        import tomllib  # here, because it takes 3 ms and most hosts have no such file

        return tomllib.loads(text)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise NotPermitted(f"{name} cannot be read: {error.strerror}", hint="let all read it: chmod a+r") from None
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, numbers and nesting without end
        raise UsageError(f"{name} is not TOML: {error}", hint="https://toml.io says how it is written") from None


def _pool(path: Path, networks: Sequence[str], reserved: Sequence[str]) -> Pool:
    """Return the pool; the first of the two keys that is wrong is the one to blame."""
    pool = Pool()
    for key, arguments in (("pool", (networks,)), ("reserved", (networks, reserved))):
        try:
            pool = Pool.parse(*arguments)
        except UsageError as error:
            raise UsageError(f"{path}: {key}: {error.message}", hint=error.hint) from None
    return pool


def _bad(path: Path, key: str, value: object, wanted: str) -> UsageError:
    return UsageError(f"{path}: {key} = {shown(value)} is not {wanted}")


def shown(value: object) -> str:
    """Return a value of a file as a refusal shows it."""
    try:
        text = repr(value)
    except ValueError:
        text = "a number without end"  # Python writes no more than 4300 digits
    return text if len(text) < 80 else f"{text[:77]}..."


def _is_domain(value: object) -> bool:
    return isinstance(value, str) and bool(_DOMAIN.fullmatch(value))


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _between(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and low <= value <= high


def _is_days(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 3650  # never a NaN


def _is_bit(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1 << 32 and value & (value - 1) == 0


def _is_group(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1 << 32


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


# What each setting may be, and how that is told to a person.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alias_budget": (_between(1, 10_000), "a number from 1 to 10000"),
    "dns_port": (_between(1024, 65534), "a port from 1024 to 65534, the next one free too"),
    "domain": (_is_domain, "a domain such as vmnet.internal"),
    "group_mapped": (_is_group, "a link group, 1 to 4294967295"),
    "group_native": (_is_group, "a link group, 1 to 4294967295"),
    "guard_forwarding": (lambda value: isinstance(value, bool), "true or false"),
    "libvirt_grace": (_is_days, "a number of days from 0 to 3650, such as 7"),
    "mark": (_is_bit, "a number with one bit set, such as 0x08000000"),
    "mtu": (_between(576, 65535), "a number from 576 to 65535"),
    "pool": (_is_texts, 'a list of networks such as ["127.1.0.0/16"]'),
    "reserved": (_is_texts, 'a list of networks such as ["127.1.27.0/24"]'),
    "shadow": (_between(240, 254), "the first octet of a /8, 240 to 254"),
    "user_guests": (_between(0, 1_000_000), "a number from 0 to 1000000"),
}
KEYS = tuple(_RULES)
_PLANE_KEYS = ("shadow", "mark", "group_mapped", "group_native", "dns_port")
