"""What a watcher shows to others: lines of a log, metrics that Prometheus reads, a file of its state."""

import json
import os
import re
import shlex
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmnet.signs import Service, Signs, read_status

SAMPLE = re.compile(r'vmnet_watch_[a-z_]+(\{cause="[a-z]+"\})? -?\d+(\.\d+)?')


def test_the_metrics_are_in_the_format_of_prometheus(tmp_path: Path) -> None:
    signs = Signs(tmp_path, None, 15)
    signs.count("looks_total", "event", 3)
    signs.count("looks_total", "look")
    signs.show(7, ["~ device vmn-a: mtu 1500"], [])
    text = (tmp_path / "vmnet.prom").read_text()
    assert text.endswith("\n")
    lines = text.splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(line) for line in samples)
    assert 'vmnet_watch_looks_total{cause="event"} 3' in samples
    assert "vmnet_watch_lost_total 0" in samples
    assert "vmnet_watch_left_alone 1" in samples
    for name in {re.split(r"[ {]", line)[0] for line in samples}:
        [kind] = [line.split()[-1] for line in lines if line.startswith(f"# TYPE {name} ")]
        assert kind == ("counter" if name.endswith("_total") else "gauge")
        assert sum(line.startswith(f"# HELP {name} ") for line in lines) == 1


def test_metrics_go_where_they_are_wanted_and_never_stand_half_written(tmp_path: Path) -> None:
    wanted = tmp_path / "textfiles/vmnet.prom"
    signs = Signs(tmp_path, wanted, 15)
    signs.show(1, [], [])  # no such folder: nobody can look, and nothing else goes wrong
    wanted.parent.mkdir()
    signs.show(1, [], [])
    assert [file.name for file in wanted.parent.iterdir()] == ["vmnet.prom"]
    signs.stop()
    assert list(tmp_path.rglob("*.*")) == []


def test_the_state_is_that_of_a_living_process(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    Signs(tmp_path, None, 15).show(2, [], ["a: gone"])
    status = read_status(tmp_path)
    assert status
    assert (status["pid"], status["guests"], status["wrong"]) == (os.getpid(), 2, ["a: gone"])
    for text in ("", "{", "[]", '{"pid": "x"}', '{"pid": 4194305}'):
        (tmp_path / "watch.json").write_text(text)
        assert read_status(tmp_path) is None


@given(st.dictionaries(st.sampled_from(["op", "by", "problem"]), st.text(), max_size=3))
def test_a_line_of_the_log_is_one_line_and_can_be_taken_apart(fields: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("sys.stderr", _Sink(lines))
        Service().log("changed", **fields)
        Service(as_json=True).log("changed", **fields)
    plain, as_json = lines
    assert plain.count("\n") == 1
    assert plain.rstrip("\n").isprintable()
    assert json.loads(as_json) | fields == json.loads(as_json)
    pairs = re.findall(r' (\w+)=("(?:[^"\\]|\\.)*"|[^ "]+)', plain.rstrip("\n").removeprefix("vmnet: changed"))
    assert {key: json.loads(value) if value[0] == '"' else value for key, value in pairs} == fields


class _Sink:
    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def write(self, text: str) -> None:
        self._lines.append(text)

    def flush(self) -> None:
        pass


def test_the_journal_is_told_how_grave_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    Service().log("left alone", level="warning", op="~ it")
    assert shlex.split(capsys.readouterr().err) == ["<4>vmnet:", "left", "alone", "op=~ it"]


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"@vmnet-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notes:
        notes.bind("\0" + name[1:] if abstract else name)
        notes.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "60000000")
        service = Service()
        service.ready()
        service.alive()
        service.alive()  # too soon for another
        service.ready()
        assert [notes.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"READY=1"]


def test_without_systemd_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    service = Service()
    service.ready()
    service.alive()
    assert service.patience == 0
