"""id(1): who calls."""

from tests.darwin.fakes.state import Answer, Failed, State, uid


def main(state: State, argv: list[str]) -> Answer:
    """Answer `-u`."""
    if argv[1:] != ["-u"]:
        raise Failed(f"fake: not modelled: {' '.join(argv)}")
    return Answer(f"{uid(state)}\n")
