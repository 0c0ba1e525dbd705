"""Where vmnet keeps things, and how it is set up: the environment and one TOML file."""

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmnet.ipam import Pool
from vmnet.model import UsageError
from vmnet.plan import Plane

_DOMAIN = re.compile(r"(?=.{1,180}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")


@dataclass(frozen=True, slots=True)
class Paths:
    """The folders and files of vmnet; `hosts` is None where no hosts file is to be kept."""

    state: Path
    run: Path
    config: Path
    hosts: Path | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Paths":
        """Return the paths that the VMNET_* variables name, or their defaults."""
        variables = os.environ if environment is None else environment
        hosts = variables.get("VMNET_HOSTS_FILE", "/etc/hosts")
        return cls(
            state=Path(variables.get("VMNET_STATE_DIR") or "/var/lib/vmnet"),
            run=Path(variables.get("VMNET_RUN_DIR") or "/run/vmnet"),
            config=Path(variables.get("VMNET_CONFIG") or "/etc/vmnet/config.toml"),
            hosts=Path(hosts) if hosts else None,
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """What the file of settings says. `guard_forwarding`: see docs/decisions/forwarding.md."""

    domain: str = "vmnet.internal"
    mtu: int = 1500
    guard_forwarding: bool = True
    pool: Pool = field(default_factory=Pool)
    plane: Plane = field(default_factory=Plane)


def load_settings(path: Path) -> Settings:
    """Return the settings in the TOML file at `path`; a missing file means all defaults.

    Raises UsageError naming the file, the key and the value for an unknown key or a bad value.
    """
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return Settings()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    return _Reader(path, values).settings()


class _Reader:
    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self._path = path
        self._values = values

    def settings(self) -> Settings:
        default, plane = Settings(), Plane()
        settings = Settings(
            domain=self._take("domain", default.domain, _is_domain, "a domain such as vmnet.internal"),
            mtu=self._take("mtu", default.mtu, _between(576, 65535), "a number from 576 to 65535"),
            guard_forwarding=self._take(
                "guard_forwarding", default.guard_forwarding, lambda value: isinstance(value, bool), "true or false"
            ),
            pool=self._pool(),
            plane=Plane(
                shadow=self._take("shadow", plane.shadow, _between(240, 254), "the first octet of a /8, 240 to 254"),
                mark=self._take("mark", plane.mark, _is_bit, "a number with one bit set, such as 0x08000000"),
                group_mapped=self._take("group_mapped", plane.group_mapped, _is_group, "a link group, 1 to 4294967295"),
                group_native=self._take("group_native", plane.group_native, _is_group, "a link group, 1 to 4294967295"),
            ),
        )
        if settings.plane.group_mapped == settings.plane.group_native:
            raise self._bad("group_native", settings.plane.group_native, "another group than group_mapped")
        for key in self._values:
            raise UsageError(
                f"{self._path}: there is no setting {key!r}", hint="docs/reference/settings.md lists all settings"
            )
        return settings

    def _pool(self) -> Pool:
        networks = self._take("pool", [], _is_texts, 'a list of networks such as ["127.1.0.0/16"]')
        reserved = self._take("reserved", [], _is_texts, 'a list of networks such as ["127.1.27.0/24"]')
        try:
            return Pool.parse(networks, reserved)
        except UsageError as error:
            raise UsageError(f"{self._path}: pool or reserved: {error.message}", hint=error.hint) from None

    def _take(self, key: str, default: Any, is_right: Callable[[Any], bool], wanted: str) -> Any:
        value = self._values.pop(key, default)
        if not is_right(value):
            raise self._bad(key, value, wanted)
        return value

    def _bad(self, key: str, value: object, wanted: str) -> UsageError:
        shown = repr(value)
        return UsageError(f"{self._path}: {key} = {shown if len(shown) < 80 else shown[:77] + '...'} is not {wanted}")


def _is_domain(value: object) -> bool:
    return isinstance(value, str) and bool(_DOMAIN.fullmatch(value))


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _between(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and low <= value <= high


def _is_bit(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1 << 32 and value & (value - 1) == 0


def _is_group(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1 << 32


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
