"""pfctl(8) of macOS: whether pf is on, who holds it on, and the rules of anchors, which are kept as they were given."""

import sys

from tests.darwin.fakes.state import Answer, Failed, State, uid

_ALTQ = "No ALTQ support in kernel\nALTQ related functions disabled\n"
_FIRST_TOKEN = 17649033312356190001


def main(state: State, argv: list[str]) -> Answer:
    """Answer `-s info`, `-e`, `-d`, `-E`, `-X TOKEN`, and of an anchor, `-a NAME`, `-f -`, `-s rules` and `-F all`."""
    if uid(state) != 0:
        raise Failed("pfctl: /dev/pf: Permission denied")
    pf = state["pf"]
    match argv[1:]:
        case ["-s", "info"]:
            return _said(out=f"Status: {'Enabled for 0 days 00:01:02' if pf['enabled'] else 'Disabled'}\n")
        case ["-e"] if pf["enabled"]:
            raise Failed(f"{_ALTQ}pfctl: pf already enabled")
        case ["-e"]:
            pf["enabled"] = True
            return _said("pf enabled\n")
        case ["-d"]:
            pf["enabled"], pf["tokens"] = False, []
            return _said("pf disabled\n")
        case ["-E"]:
            token = str(max(map(int, pf["tokens"]), default=_FIRST_TOKEN) + 1)
            pf["enabled"] = True
            pf["tokens"].append(token)
            return _said(f"pf enabled\nToken : {token}\n")
        case ["-X", token]:
            return _said(_let_go(state, token))
        case ["-a", anchor, "-f", "-"]:
            pf["anchors"][anchor] = sys.stdin.read()
            return _said()
        case ["-a", anchor, "-s", "rules"]:
            return _said(out=pf["anchors"].get(anchor, ""))
        case ["-a", anchor, "-F", "all"]:
            pf["anchors"].pop(anchor, None)
            return _said("rules cleared\n")
    raise Failed(f"fake: not modelled: {' '.join(argv)}")


def _said(err: str = "", out: str = "") -> Answer:
    return Answer(out, _ALTQ + err)


def _let_go(state: State, token: str) -> str:
    pf = state["pf"]
    if token not in pf["tokens"]:
        raise Failed(f"{_ALTQ}pfctl: no pf enable reference with the token {token}")
    pf["tokens"].remove(token)
    pf["enabled"] = bool(pf["tokens"])
    return "" if pf["tokens"] else "pf disabled\n"
