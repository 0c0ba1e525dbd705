"""sw_vers(1) of macOS: the version that goes with the kernel's release."""

from tests.darwin.fakes.state import Answer, Failed, State

_BIG_SUR, _TAHOE = 20, 25


def main(state: State, argv: list[str]) -> Answer:
    """Answer `-productVersion`."""
    if argv[1:] != ["-productVersion"]:
        raise Failed(f"fake: not modelled: {' '.join(argv)}")
    return Answer(f"{_product_version(state['darwin'])}\n")


def _product_version(darwin: str) -> str:
    """Return 10.15 for Darwin 19, 11 to 15 for 20 to 24, 26 for 25; from 11 on the minor numbers are the same."""
    major, minor = (int(number) for number in darwin.split(".")[:2])
    if major < _BIG_SUR:
        return f"10.{major - 4}.{minor}"
    return f"{major - 9 if major < _TAHOE else major + 1}.{minor}"
