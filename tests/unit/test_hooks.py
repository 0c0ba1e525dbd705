"""What vmnet puts into other programs' folders: written once, known again, and taken away without a trace."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmnet.hooks.call import Call
from vmnet.hooks.install import Run, apply, look, plan_install, plan_uninstall
from vmnet.hooks.parts import PARTS, Command, File, Part, run
from vmnet.hooks.render import command_line, quote, render
from vmnet.hooks.seal import seal, state_of
from vmnet.model import Conflict, HostLacks, UsageError
from vmnet.plan import HOST_CONF

CALL = Call((sys.executable, "-I", "-m", "vmnet"), {})
OTHER = Call(("/opt/vmnet/bin/python", "-I", "-m", "vmnet"), {"VMNET_STATE_DIR": "/srv/vmnet"})
FILES = [(part, file) for part in PARTS for file in part.files if file.template]
UNITS = [file for _, file in FILES if file.template.endswith(".service")]
NAMES = [part.name for part in PARTS]
words = st.text(st.characters(codec="utf-8").filter(str.isprintable), min_size=1)
# What makes systemd give a service mounts of its own (exec_needs_mount_namespace, src/core/execute.c, 252 to 257).
OWN_MOUNTS = {
    "BindPaths", "BindReadOnlyPaths", "DynamicUser", "ExecPaths", "ExtensionDirectories", "ExtensionImages",
    "IPCNamespacePath", "InaccessiblePaths", "LogNamespace", "MountFlags", "MountImages", "NoExecPaths",
    "PrivateDevices", "PrivateIPC", "PrivateMounts", "PrivateTmp", "ProcSubset", "ProtectControlGroups", "ProtectHome",
    "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "ProtectProc", "ProtectSystem",
    "ReadOnlyPaths", "ReadWritePaths", "RootDirectory", "RootImage", "TemporaryFileSystem",
}  # fmt: skip


def named(*names: str) -> list[Part]:
    return [part for part in PARTS if part.name in names]


def tree(root: Path) -> dict[str, object]:
    """Return all that is below a folder: content or target, and mode."""
    found: dict[str, object] = {}
    for path in root.rglob("*"):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        found[str(path.relative_to(root))] = (content, path.lstat().st_mode)
    return found


def install(root: Path, *names: str, call: Call = CALL) -> None:
    assert apply(plan_install(look(named(*names), call, root), live=False), mark=True) == []


def uninstall(root: Path, *names: str) -> None:
    assert apply(plan_uninstall(look(named(*names), CALL, root), live=False), mark=True) == []


def states(root: Path, *names: str) -> set[str]:
    return {one.state for one in look(named(*names), CALL, root)}


# Seals


@given(words, words)
def test_a_sealed_file_is_known_again_whoever_wrote_it(text: str, other: str) -> None:
    head = "# Written by vmnet hooks, which leaves it alone once somebody has changed it (seal @SEAL@).\n"
    one, two = seal(head + text), seal(head + other)
    assert state_of(one, one) == "current"
    assert state_of(one, two) == ("current" if text == other else "outdated")
    assert state_of(text.encode(), one) == "foreign"
    assert state_of(None, one) == "missing"


@pytest.mark.parametrize("file", [file for _, file in FILES], ids=lambda file: file.target)
def test_no_change_passes_unnoticed(file: File) -> None:
    content = render(file, CALL)
    for place in range(len(content)):
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        assert state_of(changed, content) in ("changed", "foreign")


@pytest.mark.parametrize("file", [file for _, file in FILES], ids=lambda file: file.target)
def test_a_file_says_in_its_first_lines_who_wrote_it(file: File) -> None:
    content = render(file, OTHER).decode()
    assert any("Written by vmnet hooks" in line for line in content.splitlines()[:2])
    assert not re.search(r"@[A-Z]+@", content)
    assert state_of(content.encode(), render(file, CALL)) == (
        "outdated"
        if file.template.startswith(("systemd/", "sysvinit/", "libvirt/", "launchd/"))
        and not file.template.endswith(".socket")
        else "current"
    )


# Installing


@settings(deadline=None)
@given(st.lists(st.sampled_from(NAMES), max_size=12), st.permutations(NAMES), st.sets(st.sampled_from(NAMES)))
def test_nothing_is_left_in_whatever_order_parts_come_and_go(
    tmp_path_factory: pytest.TempPathFactory, come: list[str], go: list[str], there: set[str]
) -> None:
    root = tmp_path_factory.mktemp("root")
    for part in named(*there):
        for file in part.files:
            (root / file.target.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
    before = tree(root)
    for name in come:
        install(root, name)
        assert states(root, name) == {"current"}
    for name in go:
        uninstall(root, name)
    assert tree(root) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_second_plan_is_empty(tmp_path: Path, name: str) -> None:
    install(tmp_path, name)
    assert plan_install(look(named(name), CALL, tmp_path), live=False) == []
    uninstall(tmp_path, name)
    assert plan_uninstall(look(named(name), CALL, tmp_path), live=False) == []


def test_a_plan_in_words_that_can_be_typed_does_the_same(tmp_path: Path) -> None:
    typed, done = tmp_path / "typed o'clock", tmp_path / "done"
    for step in plan_install(look(PARTS, OTHER, typed), live=False):
        subprocess.run(["sh", "-c", step.command()], check=True)
    apply(plan_install(look(PARTS, OTHER, done), live=False), mark=False)
    assert tree(typed) == tree(done)
    for step in plan_uninstall(look(PARTS, OTHER, typed), live=False):
        subprocess.run(["sh", "-c", step.command()], check=True)
    assert not [path for path in typed.rglob("*") if not path.is_dir()]


def test_another_vmnet_takes_over_the_files_of_the_one_before(tmp_path: Path) -> None:
    install(tmp_path, "systemd", call=OTHER)
    assert states(tmp_path, "systemd") == {"outdated", "current"}
    install(tmp_path, "systemd")
    assert states(tmp_path, "systemd") == {"current"}


@pytest.mark.parametrize("what", ["file", "folder", "link", "dangling"])
def test_what_others_put_there_is_in_the_way_and_stays(tmp_path: Path, what: str) -> None:
    path = tmp_path / "etc/systemd/system/vmnet-watch.service"
    path.parent.mkdir(parents=True)
    if what == "file":
        path.write_text("[Service]\nExecStart=/bin/true\n")
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null" if what == "link" else "nowhere")
    before = tree(tmp_path)
    with pytest.raises(Conflict, match=re.escape(str(path))):
        install(tmp_path, *NAMES)
    uninstall(tmp_path, *NAMES)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("part", "file"), FILES, ids=lambda one: one.target if isinstance(one, File) else "")
def test_what_somebody_changed_in_ours_is_theirs(tmp_path: Path, part: Part, file: File) -> None:
    install(tmp_path, part.name)
    path = tmp_path / file.target.lstrip("/")
    path.write_bytes(path.read_bytes() + b"\n")
    changed = path.read_bytes()
    install(tmp_path, part.name, call=OTHER)
    assert path.read_bytes() == changed
    uninstall(tmp_path, part.name)
    assert path.read_bytes() == changed


def test_a_run_that_was_killed_in_the_middle_is_finished_by_the_next(tmp_path: Path) -> None:
    steps = plan_install(look(PARTS, CALL, tmp_path / "whole"), live=False)
    for count in range(len(steps)):
        root = tmp_path / str(count)
        apply(plan_install(look(PARTS, CALL, root), live=False)[:count], mark=True)
        (root / "etc/sysctl.d").mkdir(parents=True, exist_ok=True)
        (root / "etc/sysctl.d/.99-vmnet.conf.vmnet").write_text("half")
        install(root, *NAMES)
        assert states(root, *NAMES) == {"current"}


def test_programs_hear_of_a_change_and_only_of_a_change(tmp_path: Path) -> None:
    said = tmp_path / "said"
    tell = Command(("tee", "-a", str(said)), when=lambda: True)
    deaf = Command(("false",), when=lambda: False)
    late = Command(("touch", str(said)), when=lambda: True, overdue=lambda: not said.exists())
    part = Part("x", lambda: True, named("udev")[0].files, installed=(tell, deaf, late), leaving=(tell,), gone=(tell,))
    steps = plan_install(look([part], CALL, tmp_path), live=True)
    assert [step.argv[0] for step in steps if isinstance(step, Run)] == ["tee", "touch"]
    assert isinstance(steps[-1], Run)
    assert plan_install(look([part], CALL, tmp_path), live=False) == steps[:1]
    apply(steps[:1], mark=True)
    assert plan_install(look([part], CALL, tmp_path), live=True) == [Run(late.argv)]
    said.touch()
    assert plan_install(look([part], CALL, tmp_path), live=True) == []
    assert [type(step).__name__ for step in plan_uninstall(look([part], CALL, tmp_path), live=True)] == [
        "Run",
        "RemoveFile",
        "Run",
    ]


def test_a_program_that_fails_is_told_of_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    complaints = apply(
        [
            Run(("no-such-program",)),
            Run((str(tmp_path / "data"),)),
            Run(("sh", "-c", "echo out of order >&2; exit 3")),
            Run(("false",)),
            Run(("touch", str(tmp_path / "last"))),
        ],
        mark=True,
    )
    assert [line.rpartition(": ")[2] for line in complaints] == [
        "there is no no-such-program",
        "Permission denied",
        "out of order",
        "exit code 1",
    ]
    assert (tmp_path / "last").exists()
    assert run(("true",)) is None


# How a service calls vmnet


@given(st.lists(words, min_size=1))
def test_a_command_survives_the_spelling_of_units(argv: list[str]) -> None:
    line = command_line(tuple(argv))
    read = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line)]
    assert read[-len(argv) :] == argv
    assert read[: -len(argv)] in ([], ["/bin/sh", "-c", 'exec "$0" "$@"'])
    # The program itself is neither unquoted twice nor searched for variables.
    program = shlex.split(line)[0].replace("%%", "%")
    assert not set(program) & set("\"'\\$")


@given(words)
def test_a_word_has_no_specifier_and_is_one_word(text: str) -> None:
    assert [word.replace("%%", "%") for word in shlex.split(quote(text))] == [text]
    assert "%" not in quote(text).replace("%%", "")


@pytest.mark.parametrize(
    "name", ["plain", "a b", "100%n", "o'brien", 'the "best"', "$HOME", "back\\slash", "é;x", "#x"]
)
def test_systemd_takes_a_vmnet_at_any_path(tmp_path: Path, name: str) -> None:
    program = tmp_path / name / "python"
    program.parent.mkdir()
    shutil.copy("/bin/true", program)
    call = Call((str(program), "-I", "-m", "vmnet"), {"VMNET_STATE_DIR": str(program.parent)})
    verify(tmp_path, call)
    line = next(line for line in render(UNITS[0], call).decode().splitlines() if line.startswith("ExecStart="))
    if line.startswith("ExecStart=/bin/sh"):
        # systemd expands $$ and %%, and hands the words to the shell.
        argv = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line.removeprefix("ExecStart="))]
        assert subprocess.run(argv).returncode == 0


@pytest.mark.parametrize("path", ["/a\nb", "/a\tb", "/a\x7f", os.fsdecode(b"/\xff")])
def test_a_path_that_no_unit_can_hold_is_refused(path: str) -> None:
    for call in ((path,), {}), (("/bin/true",), {"VMNET_STATE_DIR": path}):
        with pytest.raises(UsageError):
            Call(*call)


def test_the_call_is_of_this_vmnet_on_its_own_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("STATE_DIR", "RUN_DIR", "CONFIG", "HOSTS_FILE"):
        monkeypatch.delenv(f"VMNET_{name}", raising=False)
    assert Call.from_here() == CALL
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VMNET_STATE_DIR", "records")
    monkeypatch.setenv("VMNET_RUN_DIR", "/run/vmnet")
    monkeypatch.setenv("VMNET_HOSTS_FILE", "")
    assert Call.from_here().environment == {"VMNET_STATE_DIR": str(tmp_path / "records"), "VMNET_HOSTS_FILE": ""}


@pytest.mark.parametrize("argv", [("/nowhere/python",), ("/bin/false",), ("/bin/sh", "-c", "exit 1")])
def test_a_vmnet_that_does_not_run_by_itself_is_noticed(argv: tuple[str, ...]) -> None:
    with pytest.raises(HostLacks):
        Call(argv, {}).check()
    Call(("/bin/true",), {}).check()


# What is in the files


def verify(folder: Path, call: Call) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze, of systemd")
    units = []
    for file in UNITS:
        units.append(folder / file.target.rpartition("/")[2])
        units[-1].write_bytes(render(file, call))
    argv = ["systemd-analyze", "verify", "--recursive-errors=no", *map(str, units)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    verify(tmp_path, CALL)
    verify(tmp_path, Call(("/bin/true",), OTHER.environment))


def test_the_units_are_as_shut_as_they_are_said_to_be(tmp_path: Path) -> None:
    verify(tmp_path, CALL)
    for file in UNITS:
        unit = tmp_path / file.target.rpartition("/")[2]
        argv = ["systemd-analyze", "security", "--offline=yes", "--threshold=50", "--no-pager", str(unit)]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.target)
def test_a_service_lives_among_the_hosts_own_mounts(file: File) -> None:
    found = re.findall(r"^([A-Za-z]+)=", render(file, CALL).decode(), re.MULTILINE)
    assert not set(found) & OWN_MOUNTS
    assert "RuntimeDirectory" not in found


def test_sysctls_of_our_devices_are_those_that_vmnet_sets() -> None:
    text = render(named("sysctl")[0].files[0], CALL).decode()
    lines = dict(re.findall(r"^-net\.(ipv[46]\.conf\.vmn-\*\.\w+) = (\d)$", text, re.MULTILINE))
    wanted = {f"ipv4.conf.vmn-*.{name}": str(value) for name, value in HOST_CONF.items()}
    assert lines == {**wanted, "ipv6.conf.vmn-*.disable_ipv6": "1"}
