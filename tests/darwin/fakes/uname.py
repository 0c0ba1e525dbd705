"""uname(1) of macOS."""

from tests.darwin.fakes.state import Answer, Failed, State


def main(state: State, argv: list[str]) -> Answer:
    """Answer nothing and `-s` with the kernel's name, `-r` with its release."""
    match argv[1:]:
        case [] | ["-s"]:
            return Answer("Darwin\n")
        case ["-r"]:
            return Answer(f"{state['darwin']}\n")
    raise Failed(f"fake: not modelled: {' '.join(argv)}")
