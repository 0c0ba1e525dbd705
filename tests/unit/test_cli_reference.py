"""The reference pages and the program say the same: commands, options, exit codes, variables, JSON and settings."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from vmnet.cli.main import FOUND, app
from vmnet.cli.show import as_json
from vmnet.engine import Seen
from vmnet.ipam import guest_mac
from vmnet.model import Block, Lease, UsageError, VmnetError, device_name
from vmnet.settings import KEYS, Settings, load_settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/cli.md").read_text()
SETTINGS_PAGE = (ROOT / "docs/reference/settings.md").read_text()
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
NOT_COMMANDS = ["What all commands share", "Exit codes", "Environment"]


def sections(page: str) -> dict[str, str]:
    """Return the text below each heading of the second level."""
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables in `text`, heads left out."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        for line in table.splitlines()[2:]:
            yield [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def options(command: Any) -> dict[str, Any]:
    """Return the options of a command by their names, `-v` and `--verbose` each, help left out."""
    found = [one for one in command.params if one.param_type_name == "option"]
    return {name: one for one in found for name in one.opts}


def test_every_command_has_a_section_in_the_order_of_the_program() -> None:
    assert [name for name in sections(PAGE) if name not in NOT_COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_section_has_each_option_of_its_command_and_no_other(name: str) -> None:
    documented = [row[0] for row in rows(sections(PAGE)[name]) if row[0].startswith("`-")]
    spelled = [word for cell in documented for word in re.findall(r"(?<!\w)--?[a-z][a-z-]*", cell)]
    assert len(spelled) == len(set(spelled))
    assert set(spelled) == set(options(COMMANDS[name]))


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_that_takes_a_value_shows_it(name: str) -> None:
    for cell in [row[0] for row in rows(sections(PAGE)[name]) if row[0].startswith("`-")]:
        [option] = {id(options(COMMANDS[name])[word]) for word in re.findall(r"--[a-z-]+", cell)}
        found = next(one for one in COMMANDS[name].params if id(one) == option)
        shown = re.search(r"--[a-z-]+ ([^`]+)`", cell)
        if found.is_flag:
            assert shown is None, cell
        else:
            assert shown, cell
            assert shown[1] == (found.metavar or "|".join(found.type.choices))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_section_begins_with_how_the_command_is_called(name: str) -> None:
    usage = re.match(r"\n`vmnet ([^`]+)`\n", sections(PAGE)[name])
    assert usage
    arguments = [one.metavar for one in COMMANDS[name].params if one.param_type_name == "argument"]
    assert usage[1].split(" ", 1) == [name, " ".join(arguments)] if arguments else usage[1] == name


@pytest.mark.parametrize("name", COMMANDS)
def test_everything_has_its_help(name: str) -> None:
    command = COMMANDS[name]
    assert (command.help or "").endswith((".", "!"))
    for option in options(command).values():
        assert (option.help or "").endswith("."), option.name


def test_the_exit_codes_are_all_there() -> None:
    def below(kind: type[VmnetError]) -> set[int]:
        return {kind.exit_code}.union(*(below(one) for one in kind.__subclasses__()))

    documented = [int(code) for row in rows(sections(PAGE)["Exit codes"]) for code in row[0].split(", ")]
    # exec's own, when it cannot become its command, are those of shells.
    assert documented == sorted({0, *below(VmnetError), FOUND, 126, 127, 130})


def test_the_environment_is_all_there() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "src/vmnet").rglob("*.py"))
    read = set(re.findall(r"\.get\(\"(VMNET_[A-Z_]+)\"", source))
    documented = [row[0].strip("`") for row in rows(sections(PAGE)["Environment"])]
    assert sorted(documented) == sorted(read)


def test_the_json_that_is_shown_is_that_of_its_guest() -> None:
    shown = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])
    lease = Lease(
        name="myvm", block=Block(0), kind="tap", mode="mapped", mac=guest_mac(Block(0)), mtu=1500, owner=0, queues=1,
        netns=None, wish="up", created="2026-11-21T09:00:00Z",
    )  # fmt: skip
    made = as_json(Seen(lease, "up"), Settings())
    assert list(shown.items()) == list(made.items())
    explained = [re.findall(r"`(\w+)`", row[0]) for row in rows(sections(PAGE)["show"]) if not row[0].startswith("`-")]
    assert sorted(key for keys in explained for key in keys) == sorted(made)


def test_the_shortened_name_that_is_shown_is_one() -> None:
    assert f"`{device_name('kubernetes-node-000001')}`" in PAGE


@pytest.mark.parametrize("page", ["cli.md", "settings.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "docs/reference" / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert (ROOT / "docs/reference" / path).exists()
        assert not anchor or f"\n## {anchor}\n" in text


# Settings


def test_every_setting_has_its_row() -> None:
    assert [row[0].strip("`") for row in rows(SETTINGS_PAGE)] == list(KEYS)


def test_the_defaults_are_those_that_hold(tmp_path: Path) -> None:
    for key, default, *_ in rows(SETTINGS_PAGE):
        config = tmp_path / "config.toml"
        config.write_text(f"{key.strip('`')} = {default.strip('`')}\n")
        assert load_settings(config) == Settings(), key


def test_what_a_setting_may_be_is_what_a_refusal_says(tmp_path: Path) -> None:
    for key, _, may_be, _ in rows(SETTINGS_PAGE):
        config = tmp_path / "config.toml"
        config.write_text(f"{key.strip('`')} = 1979-05-27\n")
        with pytest.raises(UsageError) as caught:
            load_settings(config)
        assert caught.value.message.endswith(f" is not {may_be}")


def test_the_example_is_right(tmp_path: Path) -> None:
    example = re.findall(r"```toml\n(.*?)```", SETTINGS_PAGE, re.DOTALL)[0]
    config = tmp_path / "config.toml"
    config.write_text(example)
    assert load_settings(config).mtu == tomllib.loads(example)["mtu"]
