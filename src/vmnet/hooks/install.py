"""Install, take away and look at the files of parts: look, plan, apply, as everywhere.

A file that we did not write, or that somebody has changed since, is never written over and never taken away.
"""

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from vmnet.hooks.call import Call
from vmnet.hooks.parts import Command, File, Part, run
from vmnet.hooks.render import render
from vmnet.hooks.seal import State, state_of
from vmnet.model import Conflict

# In each folder that we made: what tells it from an empty one that was there before. Nobody reads hidden files there.
MADE = ".made-by-vmnet"


class WriteFile(NamedTuple):
    """Write a file of a part, be it there or not."""

    path: Path
    content: bytes
    mode: int
    fresh: bool

    def __str__(self) -> str:
        return f"{'+' if self.fresh else '~'} file {self.path}"

    def command(self) -> str:
        text = self.content.decode()
        return f"install -D -m {self.mode:04o} /dev/stdin {shlex.quote(str(self.path))} <<'END'\n{text}END"


class MakeLink(NamedTuple):
    """Make a symbolic link of a part."""

    path: Path
    target: str

    def __str__(self) -> str:
        return f"+ link {self.path} to {self.target}"

    def command(self) -> str:
        folder, path = shlex.quote(str(self.path.parent)), shlex.quote(str(self.path))
        return f"mkdir -p {folder} && ln -s {shlex.quote(self.target)} {path}"


class RemoveFile(NamedTuple):
    """Take away a file or link of a part."""

    path: Path

    def __str__(self) -> str:
        return f"- file {self.path}"

    def command(self) -> str:
        return f"rm {shlex.quote(str(self.path))}"


class Run(NamedTuple):
    """Run a program that is to hear of it; its failure is a warning."""

    argv: tuple[str, ...]
    stdin: str = ""

    def __str__(self) -> str:
        return f"! {shlex.join(self.argv)}"

    def command(self) -> str:
        return shlex.join(self.argv) + (f" <<'END'\n{self.stdin}END" if self.stdin else "")


Step: TypeAlias = WriteFile | MakeLink | RemoveFile | Run


@dataclass(frozen=True, slots=True)
class Seen:
    """A file of a part and what is in its place; `content` is what belongs there, None for a link."""

    part: Part
    file: File
    path: Path
    content: bytes | None
    state: State


def look(parts: Iterable[Part], call: Call, root: Path) -> list[Seen]:
    """Return what is in the place of each file, below `root`; raises OSError where one may not look."""
    return [_look(part, file, call, root / file.target.lstrip("/")) for part in parts for file in part.files]


def _look(part: Part, file: File, call: Call, path: Path) -> Seen:
    if file.link:
        found = os.readlink(path) if path.is_symlink() else None
        here: State = "current" if found == file.link else "foreign" if os.path.lexists(path) else "missing"
        return Seen(part, file, path, None, here)
    content = render(file, call)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return Seen(part, file, path, content, "foreign")
    return Seen(part, file, path, content, state_of(path.read_bytes() if path.exists() else None, content))


def plan_install(seen: Sequence[Seen], *, live: bool) -> list[Step]:
    """Return the steps that install what is not there or outdated; if the system is `live`, it hears of it.

    Raises Conflict for a file of somebody else's in the place of one of ours.
    """
    foreign = [str(one.path) for one in seen if one.state == "foreign"]
    if foreign:
        raise Conflict(
            f"not written by vmnet hooks, and in the way: {', '.join(foreign)}",
            hint="move it away, or leave that part out",
        )
    steps: list[Step] = []
    for part, files in _by_part(seen):
        writes = [_write(one) for one in files if one.state in ("missing", "outdated")]
        steps += [*writes, *_runs(part.installed, changed=bool(writes), live=live)]
    return steps


def plan_uninstall(seen: Sequence[Seen], *, live: bool) -> list[Step]:
    """Return the steps that take away what we wrote and nobody has changed."""
    steps: list[Step] = []
    for part, files in _by_part(seen):
        # Links first: what they lead to is gone in the end.
        removals = [RemoveFile(one.path) for one in reversed(files) if one.state in ("current", "outdated")]
        if removals:
            before, after = (_runs(which, changed=True, live=live) for which in (part.leaving, part.gone))
            steps += [*before, *removals, *after]
    return steps


def _by_part(seen: Sequence[Seen]) -> list[tuple[Part, list[Seen]]]:
    parts = {one.part.name: one.part for one in seen}
    return [(part, [one for one in seen if one.part.name == name]) for name, part in parts.items()]


def _write(one: Seen) -> Step:
    if one.content is None:
        return MakeLink(one.path, one.file.link)
    return WriteFile(one.path, one.content, one.file.mode, fresh=one.state == "missing")


def _runs(commands: Iterable[Command], *, changed: bool, live: bool) -> list[Step]:
    return [Run(one.argv) for one in commands if live and (changed or one.overdue()) and one.when()]


def apply(steps: Iterable[Step], *, mark: bool) -> list[str]:
    """Carry out `steps`; return what the programs that were run complained about.

    With `mark`, folders that have to be made bear a mark, so that they go with the last file in them.
    """
    complaints = []
    for step in steps:
        match step:
            case WriteFile():
                _make_folder(step.path.parent, mark=mark)
                _replace(step)
            case MakeLink():
                _make_folder(step.path.parent, mark=mark)
                step.path.symlink_to(step.target)
            case RemoveFile():
                step.path.unlink(missing_ok=True)
                _drop_folder(step.path.parent)
            case Run():
                complaint = run(step.argv, step.stdin)
                if complaint is not None:
                    complaints.append(f"{shlex.join(step.argv)}: {complaint}")
    return complaints


def _replace(step: WriteFile) -> None:
    temp = step.path.with_name(f".{step.path.name}.vmnet")
    temp.unlink(missing_ok=True)
    with open(temp, "xb") as file:
        file.write(step.content)
        os.fchmod(file.fileno(), step.mode)
        file.flush()
        os.fsync(file.fileno())
    temp.rename(step.path)


def _make_folder(folder: Path, *, mark: bool) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent, mark=mark)
    folder.mkdir()
    folder.chmod(0o755)
    if mark:
        (folder / MADE).touch()


def _drop_folder(folder: Path) -> None:
    while os.listdir(folder) == [MADE]:
        (folder / MADE).unlink()
        folder.rmdir()
        folder = folder.parent
