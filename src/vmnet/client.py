"""Have the server do what the command line asks for, and do it here where there is none that may.

It imports next to nothing: `_socket` and `_signal` are what `socket` and `signal` are made from, which take 5 ms
each; `posix` is what `os` is made from. A request is one message of a socket of sequenced packets (unix(7)), so none is
ever half there: words with a NUL between them, and the descriptors 0, 1, 2 and the current folder's. What the server
says: `b`, the work has begun; `x` and a number, it has ended with that exit code, or `k`, by that signal; `d`, it is
not for this server: the caller does it itself, as it does without one.
"""

import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable

SOCKET = "server.sock"
"""The server's socket, in the folder of VMNET_RUN_DIR."""
MAGIC = b"vmnet 1"
RUN, ASK = b"run", b"ask"
"""What a request is: a command line of root's, or a question of anybody else's in the typed protocol."""
SERVED = frozenset(
    {
        "apply", "carve", "create", "delete", "down", "ip", "libvirt-hook", "list", "plan", "relay", "restore", "show",
        "unrelay", "up",
    }
)  # fmt: skip
"""What a server does. What becomes another program, watches, or looks after services stays the caller's."""
BEGUN, EXITED, KILLED, DIRECT = b"b", b"x", b"k", b"d"
PATIENCE = 10.0  # seconds for a server that is there to begin
_HOOKS_PATIENCE = 2.0  # of the five that libvirt's hook has for everything
_OWN = ("/dev/fd/", "/dev/std", "/proc/self", "/proc/thread-self")
_RUN_FOLDER = b"/run/vmnet"
_LONGEST = 200_000  # bytes: what net.core.wmem_default lets a message have (socket(7)), but for a rest
_O_PATH = 0o10000000  # include/uapi/asm-generic/fcntl.h
_SOL_SOCKET, _SO_PEERCRED, _SCM_RIGHTS = 1, 17, 1
_SIGINT, _SIGHUP, _SIGQUIT, _SIGTERM, _SIGCONT, _SIGSTOP, _SIGTSTP = 2, 1, 3, 15, 18, 19, 20


def main() -> None:
    """Do what sys.argv asks for, and end this process."""
    if is_for_server(sys.argv[1:]) and sys.platform == "linux" and posix.geteuid() == 0:
        code = _have_done(sys.argv[1:])
        if code is not None:
            posix._exit(code)
    _do_here()


def is_for_server(words: list[str]) -> bool:
    """Say whether a server does such a command.

    None that starts programs which its sandbox does not know, and none that names what only the caller's process has.
    """
    if not words or words[0] not in SERVED:
        return False
    return not any(word.startswith("--seed") or one in word for word in words for one in _OWN)


def _do_here() -> None:
    """Do it in this process, which ends as soon as all is said: to take apart what was imported takes 8 ms."""
    import gc

    gc.disable()  # what is imported stays
    if sys.flags.no_site:
        import site

        site.main()
    program = _program()
    gc.freeze()
    gc.enable()
    try:
        program()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise  # with words, which Python itself says
        posix._exit(end.code)


def _program() -> "Callable[[], None]":
    if sys.argv[1:2] == ["libvirt-hook"]:
        from vmnet.libvirt.hook import main as hook

        return lambda: sys.exit(hook(sys.argv[2:]))
    from vmnet.cli import main as command_line

    return command_line


def _have_done(words: list[str]) -> int | None:
    """Return the exit code of a command that the server has done, or None where it is to be done here."""
    import _socket

    try:
        for number in (0, 1, 2):
            posix.fstat(number)  # in place of one that is closed there would be what is opened next
    except OSError:
        return None
    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        server.settimeout(_HOOKS_PATIENCE if words[0] == "libvirt-hook" else PATIENCE)
        if not connect(server) or not _ask(server, words):
            return None
        begun = server.recv(16) == BEGUN
    except OSError:
        return None
    except KeyboardInterrupt:  # whoever has not begun does not begin for somebody who has gone
        _complain("interrupted")
        return 128 + _SIGINT
    return _wait(server) if begun else None


def connect(server: "socket") -> bool:
    """Connect to the server; say whether it is root's: nobody else is told or given anything. Raises OSError."""
    server.connect(_address())
    credentials = server.getsockopt(_SOL_SOCKET, _SO_PEERCRED, 12)  # struct ucred: pid, uid, gid
    return credentials[4:8] == bytes(4)


def _address() -> bytes:
    """Return the path of the server's socket: 107 bytes at most (unix(7)), by a descriptor where it is longer."""
    folder = posix.environ.get(b"VMNET_RUN_DIR") or _RUN_FOLDER
    if len(folder) > 90:
        folder = b"/proc/self/fd/%d" % posix.open(folder, _O_PATH | posix.O_CLOEXEC)
    return folder + b"/" + SOCKET.encode()


def _ask(server: "socket", words: list[str]) -> bool:
    request = b"\0".join((MAGIC, RUN, own_code(), *_arguments(words), *_environment()))
    if len(request) > _LONGEST:
        return False
    folder = posix.open(".", _O_PATH | posix.O_CLOEXEC)
    descriptors = b"".join(one.to_bytes(4, sys.byteorder) for one in (0, 1, 2, folder))
    server.sendmsg([request], [(_SOL_SOCKET, _SCM_RIGHTS, descriptors)])
    posix.close(folder)
    return True


def _arguments(words: list[str]) -> list[bytes]:
    """Return how many there are, and they."""
    return [b"%d" % len(words), *(word.encode(sys.getfilesystemencoding(), "surrogateescape") for word in words)]


def _environment() -> list[bytes]:
    return [name + b"=" + value for name, value in posix.environ.items()]


def own_code() -> bytes:
    """Return which files this vmnet is, for a server to compare with its own: one of another version has others."""
    found = posix.stat(__file__)
    return b"%d:%d:%d" % (found.st_dev, found.st_ino, found.st_mtime_ns)


def _wait(server: "socket") -> int:
    """Return the exit code once the work is done; signals go on to who does it."""
    import _signal  # type: ignore[import-not-found]  # no stub; `signal` is made from it

    def pass_on(number: int, _: object) -> None:
        try:
            server.send(bytes([_SIGSTOP if number == _SIGTSTP else number]))
        except OSError:
            return
        if number == _SIGTSTP:
            posix.kill(posix.getpid(), _SIGSTOP)
            try:
                server.send(bytes([_SIGCONT]))
            except OSError:
                return  # it is done already

    for number in (_SIGINT, _SIGHUP, _SIGQUIT, _SIGTERM, _SIGTSTP):
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, pass_on)
    server.settimeout(None)
    try:
        said = server.recv(16)
    except OSError:
        said = b""
    if said[:1] == EXITED:
        return int(said[1:])
    if said[:1] == KILLED:
        number = int(said[1:])
        if number not in (9, _SIGSTOP):
            _signal.signal(number, _signal.SIG_DFL)
        posix.kill(posix.getpid(), number)
        return 128 + number
    _complain("the server ended before this was done")
    return 1


def _complain(message: str) -> None:
    hint = "vmnet up finishes what was begun"
    try:
        posix.write(2, f"vmnet: {message}\nhint: {hint}\n".encode())
        if "--json" in sys.argv:
            posix.write(1, f'{{"error": {{"code": 1, "message": "{message}", "hint": "{hint}"}}}}\n'.encode())
    except OSError:
        pass  # there is nobody to be told
