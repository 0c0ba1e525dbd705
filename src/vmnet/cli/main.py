"""The commands. `main` alone exits, and turns what went wrong into one line, a hint and an exit code."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import copy
from enum import StrEnum
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.exceptions import TyperException
from typer.main import get_command_name
from typer.models import CommandInfo

from vmnet import __version__
from vmnet.cli import run as runs
from vmnet.cli.caller import caller_uid, is_user
from vmnet.cli.hooks import hooks
from vmnet.cli.nextstep import qemu_arguments
from vmnet.cli.run import cannot_run
from vmnet.cli.show import Reporter, as_json, op_as_json, print_guests, print_next_step, print_ops, say
from vmnet.cli.values import check_mtu, check_queues, parse_address, parse_mac, parse_owner
from vmnet.engine import Engine
from vmnet.libvirt.element import libvirt_interface
from vmnet.model import HostLacks, KernelRefused, Mode, NotPermitted, UsageError, VmnetError, check_name
from vmnet.ops import Op
from vmnet.platform import Listener, Platform, Report
from vmnet.settings import Paths, backend, load_settings
from vmnet.specs import GuestSpec

if TYPE_CHECKING:
    from vmnet.requests import Answer

app = typer.Typer(
    name="vmnet",
    help="Addresses for VMs and containers that no LAN can ever take.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing: exit 10 if anything.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show each step as the command that does it.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of guests.")]
SomeNames = Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Names of guests.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The name of a guest.")]
Command = Annotated[list[str], typer.Argument(metavar="-- CMD...", help="The command and its arguments.")]
Ports = Annotated[list[str], typer.Argument(metavar="PORT[:HOST:PORT][/tcp|udp]...", help="What leads where.")]
OwnPorts = Annotated[list[str], typer.Argument(metavar="PORT[/tcp|udp]...", help="What leads nowhere any more.")]
Native = Annotated[bool, typer.Option("--native", help="The guest itself has its 127 address.")]
Mapped = Annotated[bool, typer.Option("--mapped", help="The guest has the shadow, and needs no change.")]
Address = Annotated[str | None, typer.Option(metavar="A", help="Its address: the third of a /30 of the pool.")]
Mac = Annotated[str | None, typer.Option(metavar="M", help="The guest's MAC.")]
Mtu = Annotated[int | None, typer.Option(metavar="N", help="The MTU of its devices, 576 to 65535.")]
Owner = Annotated[str | None, typer.Option(metavar="USER", help="Who may open the tap: a name or a uid.")]
Queues = Annotated[int | None, typer.Option(metavar="N", help="Queues of a tap, 1 to 256.")]

FOUND = 10
_INTERRUPTED = 130  # 128 and the number of SIGINT, as shells tell it
_LONGEST = 2000  # characters of a message: what was asked for may be of any length


class LibvirtVerb(StrEnum):
    """What can be done with libvirt's domains."""

    status = "status"
    attach = "attach"
    adopt = "adopt"


class KindOption(StrEnum):
    """The kinds of guests."""

    tap = "tap"
    veth = "veth"
    tun = "tun"
    alias = "alias"


@contextmanager
def _engine(*, verbose: bool = False) -> Iterator[Engine]:
    with Reporter(verbose=verbose) as reporter, _open_engine(reporter) as engine:
        yield engine


@contextmanager
def _open_engine(
    report: Report, holds_back: Callable[[Op], bool] = lambda _: False, *, on_behalf: int | None = None
) -> Iterator[Engine]:
    """Open the engine as the environment has it: for the caller, or for a user without root."""
    paths = Paths.from_environment()
    settings = load_settings(paths.config)
    with _open_platform(paths.run) as platform:
        caller = caller_uid() if on_behalf is None else on_behalf
        yield Engine(platform, settings, paths, report, caller, holds_back, on_behalf)


def _open_platform(run: Path) -> AbstractContextManager[Platform]:
    """Return the system that vmnet acts on, with nothing loaded of any other."""
    name = backend()
    if name == "linux":
        from vmnet.linux.platform import LinuxPlatform

        return LinuxPlatform(run)
    if name == "darwin":
        from vmnet.darwin.platform import DarwinPlatform

        return DarwinPlatform()
    raise HostLacks(f"vmnet does not run on {name}", hint="VMNET_PLATFORM is linux, or darwin for macOS and FreeBSD")


def _need_linux(what: str, hint: str) -> None:
    """Raise HostLacks on a system that has no guests with networks of their own."""
    if backend() != "linux":
        raise HostLacks(f"{what} is for guests with a network of their own, which only Linux has", hint=hint)


@app.command()
def create(
    names: Names,
    kind: Annotated[
        KindOption | None, typer.Option(help="What the guest is; without --netns a tap, on macOS an alias.")
    ] = None,
    netns: Annotated[
        str | None, typer.Option(metavar="NS", help="Put a veth into this network namespace: a name or a path.")
    ] = None,
    native: Native = False,
    mapped: Mapped = False,
    address: Address = None,
    mac: Mac = None,
    mtu: Mtu = None,
    owner: Owner = None,
    queues: Queues = None,
    json_: Json = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Give each NAME an address, its devices and its way out; carve the host if need be."""
    for option, value in (("--address", address), ("--mac", mac), ("--netns", netns)):
        if value is not None and len(names) > 1:
            raise UsageError(f"{option} is for one guest, not for {len(names)}", hint="call create once for each")
    chosen = kind or (KindOption.veth if netns is not None else None)
    spec = _spec(chosen, native, mapped, address, mac, mtu, owner, queues)
    specs = [spec._replace(name=check_name(name), netns=netns) for name in names]
    if answer := _ask_to_create(specs, dry_run=dry_run, verbose=verbose):
        if dry_run:
            _say_ops(answer.ops, json_=json_, verbose=verbose)
        _say_guests(answer.guests, json_=json_)
        if len(names) == 1 and not json_:
            with _engine() as engine:
                print_next_step(engine.lease(names[0]))
        return
    with _engine(verbose=verbose) as engine:
        if dry_run:
            _say_plan(engine.create(specs, dry_run=True)[1], json_=json_, verbose=verbose)
        made = engine.create_and_look(specs)
        _say_guests([as_json(one, engine.settings) for one in made], json_=json_)
        if len(made) == 1 and not json_:
            print_next_step(made[0].lease)


def _ask(verb: str, **fields: Any) -> "Answer | None":
    """Return what the server answers a user without root; None for anybody else, and where no server is for this."""
    if not is_user():
        return None
    from vmnet.cli.asking import ask

    return ask(Paths.from_environment(), verb=verb, **fields)


def _ask_to_create(specs: Sequence[GuestSpec], *, dry_run: bool, verbose: bool) -> "Answer | None":
    """Have the server create guests that are alike but for their names."""
    one = specs[0]
    return _ask(
        "create",
        names=tuple(spec.name for spec in specs),
        dry_run=dry_run,
        steps=verbose,
        kind=one.kind,
        mode=one.mode,
        address=None if one.address is None else str(one.address),
        mac=one.mac,
        mtu=one.mtu,
        queues=one.queues,
        netns=one.netns,
    )


@app.command()
def delete(
    names: SomeNames = None,
    every: Annotated[bool, typer.Option("--all", help="Delete all guests.")] = False,
    if_exists: Annotated[bool, typer.Option("--if-exists", help="A name that is not there is no error.")] = False,
    json_: Json = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Delete guests: their devices, their names and their records."""
    if bool(names) == every:
        raise UsageError("give names or --all", hint="vmnet delete NAME..., or vmnet delete --all")
    checked = None if every else [check_name(name) for name in names or ()]
    asked = {"names": tuple(dict.fromkeys(checked or ())), "every": every, "if_exists": if_exists}
    if answer := _ask("delete", **asked, dry_run=dry_run, steps=verbose):
        gone, shown = list(answer.deleted), answer.ops
    else:
        with _engine(verbose=verbose) as engine:
            gone, ops = engine.delete(checked, if_exists=if_exists, dry_run=dry_run)
            shown = tuple(map(op_as_json, ops))
    if dry_run:
        _say_ops(shown, json_=json_, verbose=verbose)
    if json_:
        say(json.dumps({"deleted": gone}))
    elif sys.stdout.isatty():
        for name in gone:
            say(f"{name} is deleted")


@app.command("list")
def list_(json_: Json = False) -> None:
    """List all guests."""
    _say_guests(_look(None), json_=json_)


@app.command()
def show(
    name: Name,
    cloud_init: Annotated[bool, typer.Option("--cloud-init", help="Print what cloud-init in the VM needs.")] = False,
    seed: Annotated[Path | None, typer.Option(metavar="FILE", help="Make a seed image of that for cloud-init.")] = None,
    user_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The user-data for cloud-init, in place of vmnet's.")
    ] = None,
    qemu: Annotated[bool, typer.Option("--qemu", help="Print the arguments that give qemu the tap.")] = False,
    libvirt: Annotated[bool, typer.Option("--libvirt", help="Print the XML that gives libvirt the tap.")] = False,
    json_: Json = False,
) -> None:
    """Show one guest, with all that its programs may want to know."""
    with _engine() as engine:
        if qemu or libvirt:
            lease = engine.lease(check_name(name))
            words = qemu_arguments(lease) if qemu else libvirt_interface(lease)
            say(json.dumps(words) if json_ else words if isinstance(words, str) else " ".join(words))
            return
        if cloud_init or seed or user_data:
            from vmnet.cli.seed import show_cloud_init

            lease = engine.lease(check_name(name))
            show_cloud_init(lease, engine.settings, seed=seed, user_data=user_data, caller=engine.caller, as_json=json_)
            return
    [guest] = _look(check_name(name))
    if json_:
        say(json.dumps(guest))
        return
    width = max(map(len, guest))
    for key, value in guest.items():
        shown = "-" if value is None or value == [] else ", ".join(value) if isinstance(value, list) else value
        say(f"{key:<{width}}  {shown}")


def _look(name: str | None) -> Sequence[Mapping[str, Any]]:
    """Return how a guest is, or all of them; a user without root does not see into their namespaces, and asks."""
    names = () if name is None else (name,)
    with suppress(NotPermitted):  # who is no member sees what all may see
        if answer := _ask("look", names=names, every=name is None):
            return answer.guests
    with _engine() as engine:
        return [as_json(one, engine.settings) for one in engine.look(list(names) or None)]


@app.command()
def ip(name: Name, json_: Json = False) -> None:
    """Print a guest's address."""
    with _engine() as engine:
        address = str(engine.lease(check_name(name)).block.address)
        say(json.dumps({"address": address}) if json_ else address)


@app.command()
def up(names: SomeNames = None, json_: Json = False, dry_run: DryRun = False, verbose: Verbose = False) -> None:
    """Make the kernel match the records: of the guests named, or of all of vmnet."""
    _converge("up", names, json_=json_, dry_run=dry_run, verbose=verbose)


@app.command()
def down(names: SomeNames = None, json_: Json = False, dry_run: DryRun = False, verbose: Verbose = False) -> None:
    """Take devices away until `up`, and keep the records: of the guests named, or all of vmnet."""
    _converge("down", names, json_=json_, dry_run=dry_run, verbose=verbose)


def _converge(verb: str, names: Sequence[str] | None, *, json_: bool, dry_run: bool, verbose: bool) -> None:
    checked = [check_name(name) for name in names] if names else None
    asked = tuple(dict.fromkeys(checked or ()))
    if asked and (answer := _ask(verb, names=asked, dry_run=dry_run, steps=verbose)):
        if dry_run:
            _say_ops(answer.ops, json_=json_, verbose=verbose)
        if json_:
            say(json.dumps(answer.guests))
        return
    with _engine(verbose=verbose) as engine:
        if verb == "up" and not dry_run:
            runs.end_dead_runs(engine)
        do = engine.up if verb == "up" else engine.down
        ops = do(checked, dry_run=dry_run)
        if dry_run:
            _say_plan(ops, json_=json_, verbose=verbose)
        if json_:
            say(json.dumps([as_json(one, engine.settings) for one in engine.look(checked)]))


@app.command()
def carve(json_: Json = False, dry_run: DryRun = False, verbose: Verbose = False) -> None:
    """Make room in 127/8: shrink lo to 127.0.0.1/16, fence the pool, load the rules."""
    with _engine(verbose=verbose) as engine:
        ops = engine.carve(dry_run=dry_run)
        if dry_run:
            _say_plan(ops, json_=json_, verbose=verbose)
        if json_:
            say(json.dumps({"carved": engine.platform.carves}))
        elif not engine.platform.carves:
            say(
                f"nothing to carve: here a guest is an alias of {engine.platform.loopback}, and all else stays as it is"
            )


@app.command()
def restore(
    purge: Annotated[bool, typer.Option("--purge", help="Forget all records too.")] = False,
    json_: Json = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Take all guests down and put the host back as it was found; records stay."""
    with _engine(verbose=verbose) as engine:
        ops = engine.restore(purge=purge, dry_run=dry_run)
        if dry_run:
            _say_plan(ops, json_=json_, verbose=verbose)
        if json_:
            say(json.dumps({"carved": False}))


@app.command()
def plan(json_: Json = False, verbose: Verbose = False) -> None:
    """Say what `up` would do: exit 0 when nothing is to be done, 10 otherwise."""
    with _engine() as engine:
        _say_plan(engine.up(dry_run=True), json_=json_, verbose=verbose)


@app.command()
def apply(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A TOML file of guests; - is the standard input.")],
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete guests that an earlier apply made and FILE does not name.")
    ] = False,
    json_: Json = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Create the guests that FILE names, all or none; what is there already stays."""
    from vmnet.cli.guestfile import read_guests, say_applied

    specs = read_guests(file)
    with _engine(verbose=verbose) as engine:
        done = engine.apply(specs, prune=prune, dry_run=dry_run)
        if dry_run:
            _say_plan(done.ops, json_=json_, verbose=verbose)
        say_applied(done, engine.settings, json_=json_)


@app.command()
def watch(
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="How often to look without any event.")] = 15.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, put right what differs, and end.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Say how the watcher is; exit 10 without one.")] = False,
    metrics: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write metrics for Prometheus there, not to the run folder.")
    ] = None,
    json_: Json = False,
    verbose: Verbose = False,
) -> None:
    """Keep the kernel as recorded, whatever others do to it; what is to be down stays so."""
    from vmnet.cli import watch as program

    if not 0.1 <= interval <= 3600:
        raise UsageError(f"--interval {interval:g} is not between 0.1 and 3600 seconds")
    paths = Paths.from_environment()
    if status:
        raise typer.Exit(program.show_status(paths.run, as_json=json_))
    if once:
        with _engine(verbose=verbose) as engine:
            runs.end_dead_runs(engine)
            engine.keep_or_raise()
        return
    file = Path(metrics) if metrics else None
    program.run(_open_engine, paths, interval=interval, metrics=file, as_json=json_)


@app.command()
def serve(
    descriptor: Annotated[
        int | None, typer.Option("--fd", metavar="N", help="Listen at the socket behind descriptor N.")
    ] = None,
    parent: Annotated[
        int | None, typer.Option("--parent", metavar="PID", help="End with that process, which has started this one.")
    ] = None,
    json_: Json = False,
) -> None:
    """Do at once what root's vmnet is called for, and what members of group vmnet ask for guests of their own."""
    from vmnet.cli.serve import run_server

    _need_linux("serve", "the commands work without a server")
    run_server(main, _open_engine, rehearse, descriptor=descriptor, parent=parent, as_json=json_)


def rehearse(will_fork: bool) -> None:
    """Go the way of a command that changes nothing, so that the next one finds it all read and in memory."""
    calls = ["ip rehearsal", "create rehearsal rehearsal --mac x"]
    with suppress(VmnetError, OSError), _open_engine(Listener()) as engine:
        if engine.rehearse(will_fork=will_fork):
            calls += ["create rehearsal --dry-run --netns /nowhere", "delete rehearsal --dry-run"]
    for command in app.registered_commands:
        _command(_name_of(command))
    for call in map(str.split, calls):
        with suppress(VmnetError, OSError):
            _command(call[0])(call, prog_name="vmnet", standalone_mode=False)


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what is wrong on this host, what shows it, and what to do: exit 0 when nothing is, 10 otherwise."""
    from vmnet.cli.doctor import show_findings

    raise typer.Exit(show_findings(_open_engine, as_json=json_))


@app.command("exec", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def exec_(name: Name, command: Command) -> None:
    """Run CMD in a guest's network namespace, as ip netns exec does; its exit code is CMD's."""
    argv = command[1:] if command[0] == "--" else command
    if not argv:
        raise UsageError("no command is given", hint=f"vmnet exec {name} -- CMD...")
    with _engine() as engine:
        try:
            engine.execute(check_name(name), argv)
        except OSError as error:
            raise cannot_run(argv[0], error) from None


@app.command()
def run(
    name: Name,
    command: Command,
    kind: Annotated[KindOption, typer.Option(help="What the guest is.")] = KindOption.veth,
    native: Native = False,
    mapped: Mapped = False,
    address: Address = None,
    mac: Mac = None,
    mtu: Mtu = None,
    owner: Owner = None,
    queues: Queues = None,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Create a guest, run CMD inside it (a tap's or a tun's outside), delete it; the exit code is CMD's."""
    _need_linux("run", f"vmnet create {name}, CMD, and vmnet delete {name} do the same for an address of this host")
    checked = check_name(name)
    spec = _spec(kind, native, mapped, address, mac, mtu, owner, queues)._replace(name=checked, new=True)
    with _engine(verbose=verbose) as engine:
        if dry_run:
            _say_plan(engine.create([spec], dry_run=True)[1], json_=False, verbose=verbose)
        sys.exit(runs.run(_open_engine, engine, spec, command))


app.command()(hooks)


@app.command()
def relay(name: Name, ports: Ports, json_: Json = False, dry_run: DryRun = False, verbose: Verbose = False) -> None:
    """Have ports of an alias lead elsewhere while vmnet watch runs: to HOST:PORT, or to the same port of 127.0.0.1."""
    from vmnet.cli.relays import parse_relay

    _change_relays(name, json_, dry_run, verbose, add=[parse_relay(one) for one in ports])


@app.command()
def unrelay(
    name: Name, ports: OwnPorts, json_: Json = False, dry_run: DryRun = False, verbose: Verbose = False
) -> None:
    """Have ports of an alias lead nowhere any more."""
    from vmnet.cli.relays import parse_relay

    drop = [(one.port, one.protocol) for one in map(parse_relay, ports)]
    _change_relays(name, json_, dry_run, verbose, drop=drop)


def _change_relays(name: str, as_json: bool, dry_run: bool, verbose: bool, **changes: Any) -> None:
    from vmnet.cli.relays import Change, say_changes
    from vmnet.watch import have_looked

    with _engine(verbose=verbose) as engine:
        new, gone = engine.change_relays(check_name(name), **changes, dry_run=dry_run)
        done = [Change(name, one, is_new) for relays, is_new in ((new, True), (gone, False)) for one in relays]
        if dry_run:
            _say_plan(done, json_=as_json, verbose=verbose)
        say_changes(done, as_json=as_json)
        if done and not have_looked(engine.paths.run) and new:
            engine.report.warn("no watcher is at work, who relays: vmnet hooks install sets one up, vmnet watch is one")


@app.command()
def libvirt(
    verb: Annotated[LibvirtVerb, typer.Argument(metavar="status|attach|adopt", help="What to do.")],
    subject: Annotated[
        str | None, typer.Argument(metavar="[DOMAIN|NETWORK]", help="The domain to attach; the network to adopt.")
    ] = None,
    connect: Annotated[str, typer.Option(metavar="URI", help="Which libvirt.")] = "qemu:///system",
    name: Annotated[str | None, typer.Option(metavar="NAME", help="attach: what the guest is called.")] = None,
    instead: Annotated[
        bool, typer.Option("--instead", help="adopt: in place of the interface on NETWORK, not beside it.")
    ] = False,
    json_: Json = False,
    dry_run: DryRun = False,
    verbose: Verbose = False,
) -> None:
    """Say what libvirt has of vmnet's, and give it more: to a domain, or to those on one of its networks."""
    from vmnet.cli import domains

    _need_linux("libvirt", "vmnet create NAME gives an address of this host a name")
    if verb is LibvirtVerb.status:
        if subject is not None or name is not None or instead or dry_run:
            raise UsageError("status is for all domains, and changes nothing", hint="vmnet libvirt status [--json]")
        with _engine() as engine:
            domains.show_status(engine, connect, as_json=json_)
        return
    what = "DOMAIN" if verb is LibvirtVerb.attach else "NETWORK"
    if subject is None:
        raise UsageError(f"no {what.lower()} is named", hint=f"vmnet libvirt {verb} {what}")
    if (name is not None and verb is LibvirtVerb.adopt) or (instead and verb is LibvirtVerb.attach):
        raise UsageError(f"{'--name' if instead is False else '--instead'} is not for {verb}")
    if name is not None:
        check_name(name)
    with _engine(verbose=verbose) as engine:
        ready = (
            domains.Attaching(engine, connect, subject, name)
            if verb is LibvirtVerb.attach
            else domains.Adopting(engine, connect, subject, instead=instead)
        )
        if dry_run:
            _say_plan(ready.preview(), json_=json_, verbose=verbose)
        ready.carry_out(as_json=json_)


def _say_plan(ops: Sequence[Any], *, json_: bool, verbose: bool) -> None:
    """Print a plan and exit: 10 where there is something to do."""
    _say_ops(list(map(op_as_json, ops)), json_=json_, verbose=verbose)


def _say_ops(ops: Sequence[Mapping[str, str]], *, json_: bool, verbose: bool) -> None:
    print_ops(ops, json_=json_, verbose=verbose)
    raise typer.Exit(FOUND if ops else 0)


def _say_guests(guests: Sequence[Mapping[str, Any]], *, json_: bool) -> None:
    if json_:
        say(json.dumps(guests))
    else:
        print_guests(guests)


def _spec(
    kind: KindOption | None,
    native: bool,
    mapped: bool,
    address: str | None,
    mac: str | None,
    mtu: int | None,
    owner: str | None,
    queues: int | None,
) -> GuestSpec:
    """Return what the options that `create` and `run` share ask for, for a guest that has no name yet."""
    if native and mapped:
        raise UsageError("--native and --mapped exclude each other", hint="leave one of them out")
    mode: Mode | None = "native" if native else "mapped" if mapped else None
    return GuestSpec(
        name="",
        kind=kind.value if kind else None,
        mode=mode,
        address=parse_address("--address", address),
        mac=parse_mac("--mac", mac),
        mtu=check_mtu("--mtu", mtu),
        owner=parse_owner("--owner", owner),
        queues=check_queues("--queues", queues),
    )


def _version(wanted: bool) -> None:
    if wanted:
        say(f"vmnet {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(UsageError.exit_code)


@cache
def _command(name: str | None) -> Any:
    """Return what typer makes of one command, or of all where none is called so, which takes it 3 ms longer."""
    one = [command for command in app.registered_commands if _name_of(command) == name]
    part = copy(app)
    part.registered_commands = one or app.registered_commands
    return typer.main.get_command(part)


def _name_of(command: CommandInfo) -> str:
    return command.name or get_command_name(command.callback.__name__ if command.callback else "")


def main() -> None:
    """Run the command line and exit, with nothing left to be written."""
    try:
        sys.exit(_exit_code())
    finally:
        _flush()


def _exit_code() -> int:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may be spelled in what this locale cannot write
    try:
        code = _command(sys.argv[1] if len(sys.argv) > 1 else None)(prog_name="vmnet", standalone_mode=False)
    except VmnetError as error:
        code = _say_error(error.exit_code, error.message, error.hint)
    except TyperException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "vmnet")
        code = _say_error(
            UsageError.exit_code, error.format_message().rstrip("."), f"{command} --help says what it takes"
        )
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        code = _say_error(KernelRefused.exit_code, f"{name}{error.strerror or error}", "")
    if code == _INTERRUPTED:
        _say_error(code, "interrupted", "vmnet up finishes what was begun")
    return code if isinstance(code, int) else 0


def _say_error(code: int, message: str, hint: str) -> int:
    """Say what went wrong, as far as anybody can be told, and return the exit code."""
    message, hint = _one_line(message), _one_line(hint)
    with suppress(OSError):
        typer.echo(f"vmnet: {message}" + (f"\nhint: {hint}" if hint else ""), err=True)
    with suppress(OSError):
        if _asks_for_json(sys.argv[1:]):
            typer.echo(json.dumps({"error": {"code": code, "message": message, "hint": hint}}))
    return code


def _asks_for_json(arguments: Sequence[str]) -> bool:
    """Say whether the call asks for JSON, be it one that makes no sense; what exec is to run is another program's."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in own and own[0] != "exec"


def _one_line(text: str) -> str:
    """Return `text` fit for one line of a terminal: names and values in it may be anybody's."""
    shown = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in " ".join(text.split()))
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 3] + "..."


def _flush() -> None:
    """Write out what is left, where it can be: Python itself would complain in its own words."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream and stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
