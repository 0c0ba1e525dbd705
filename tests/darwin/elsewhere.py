"""vmnet's command line, as a program, on a system that has nothing of what is Linux's own.

What Python has on Linux and not on macOS is taken out of its modules, and whoever loads vmnet.linux or a C library by
ctypes, or opens anything of /proc or /sys, fails.
"""

import fcntl
import os
import select
import signal
import socket
import sys
from typing import Any

_MISSING: dict[Any, str] = {
    os: "pipe2 pidfd_open memfd_create eventfd eventfd_read eventfd_write splice copy_file_range getrandom"
    " setns unshare sched_setaffinity posix_fadvise posix_fallocate listxattr getxattr setxattr"
    " removexattr setresuid setresgid getresuid getresgid O_PATH O_TMPFILE O_DIRECT O_NOATIME O_LARGEFILE",
    signal: "sigwaitinfo sigtimedwait pidfd_send_signal SIGRTMIN SIGRTMAX SIGPWR SIGPOLL",
    select: "epoll EPOLLIN EPOLLOUT EPOLLERR EPOLLHUP EPOLL_CLOEXEC",
    socket: "AF_NETLINK AF_PACKET AF_VSOCK SOCK_CLOEXEC SOCK_NONBLOCK SO_BINDTODEVICE SO_MARK MSG_NOSIGNAL",
    fcntl: "F_SETPIPE_SZ F_GETPIPE_SZ F_ADD_SEALS F_GET_SEALS F_NOTIFY",
}
_FOREIGN = ("vmnet.linux", "pyroute2", "ctypes")


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if not arguments or not isinstance(arguments[0], str):
        return
    what = arguments[0]
    if what.startswith(("/proc", "/sys/")) or (event == "import" and what.startswith(_FOREIGN)):
        raise AssertionError(f"{event} {what}: that is Linux's own")


if __name__ == "__main__":
    sys.path.pop(0)
    for module, names in _MISSING.items():
        for name in names.split():
            vars(module).pop(name, None)
    sys.platform = "darwin"
    sys.addaudithook(_refuse)
    from vmnet.cli.main import main

    main()
