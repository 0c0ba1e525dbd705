"""Runs inside the booted machine, as a service: takes orders by a serial port of the hypervisor's.

Each order is a line of JSON, {"argv": [...], "stdin": TEXT, "timeout": SECONDS}; so is its answer: {"code": N,
"out": TEXT, "err": TEXT}; code 124 stands for a program that was killed when its time was up. {"ready": BOOT_ID} is
sent first.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMED_OUT = 124


def _text(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")


def carry_out(argv: list[str], stdin: str, timeout: float) -> dict[str, Any]:
    """Run a program to its end and return the answer."""
    try:
        done = subprocess.run(argv, input=stdin.encode(), capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as late:
        return {"code": TIMED_OUT, "out": _text(late.stdout), "err": _text(late.stderr)}
    except OSError as error:
        return {"code": 127, "out": "", "err": f"{error}\n"}
    return {"code": done.returncode, "out": _text(done.stdout), "err": _text(done.stderr)}


def main(port: str) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with open(port, "r+b", buffering=0) as line:
        line.write(json.dumps({"ready": boot}).encode() + b"\n")
        # One byte at a time is how readline() reads an unbuffered file: an order is short.
        while order := line.readline():
            answer = json.dumps(carry_out(**json.loads(order))).encode() + b"\n"
            while answer:
                answer = answer[line.write(answer) :]


if __name__ == "__main__":
    main(sys.argv[1])
