"""The frame of the `mantle` command: the table of commands, the global flags, and how a run ends.

A command lives in a module of its own and is imported only when it is called, because `mantle version --client` has
80 ms to start. A command module defines `command`, made with `@mesh_command()`; its function takes a `Globals` first.
Nothing here imports grpc, aiohttp, rich or cryptography, and no command module may import them at its top.

Exit codes: 0 done, 1 it failed, 2 it was called wrongly.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

import mantle
from mantle.cli.output import Failure

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("mantle.cli.demo:command", "Start a mesh with the emojivoto application and watch it being encrypted."),
    "up": ("mantle.cli.up:command", "Run Kubernetes YAML on this machine, every pod in the mesh."),
    "down": ("mantle.cli.down:command", "Stop a mesh and remove every trace of it."),
    "ps": ("mantle.cli.ps:command", "List the pods of a mesh."),
    "logs": ("mantle.cli.logs:command", "Print the logs of a pod."),
    "exec": ("mantle.cli.exec:command", "Run a program inside a pod."),
    "port-forward": ("mantle.cli.port_forward:command", "Reach a port of a pod or service from this machine."),
    "install": ("mantle.cli.install:command", "Print the control plane as Kubernetes YAML."),
    "upgrade": ("mantle.cli.upgrade:command", "Print the control plane of this version, with the mesh's own values."),
    "uninstall": ("mantle.cli.uninstall:command", "Print everything of Mantle's in a cluster, to delete it."),
    "inject": ("mantle.cli.inject:command", "Add the mesh to Kubernetes YAML."),
    "uninject": ("mantle.cli.uninject:command", "Take Kubernetes YAML out of the mesh again."),
    "migrate-tls": ("mantle.cli.migrate_tls:command", "Move workloads out of the experimental mode, without a gap."),
    "tap": ("mantle.cli.tap:command", "Watch requests as they happen, with their TLS state."),
    "edges": ("mantle.cli.edges:command", "Show who talks to whom, with both identities, or why not encrypted."),
    "stat": ("mantle.cli.stat:command", "Show success rate, request rate, latency and share of TLS."),
    "top": ("mantle.cli.top:command", "Show the busiest requests, with latency and success, as they happen."),
    "diagnostics": ("mantle.cli.diagnostics:command", "Look at what proxies are told, and at what they measure."),
    "check": ("mantle.cli.check:command", "Find what is wrong with this machine, the mesh or its traffic."),
    "identity": ("mantle.cli.identity:command", "Show the certificate that a workload uses now."),
    "version": ("mantle.cli.version:command", "Show the versions of both programs and of the running mesh."),
    "completion": ("mantle.cli.completion:command", "Print the completion script of a shell."),
}
"""Each command: where it is (`module:attribute`) and what it does. The order is that of `mantle --help`."""

OUTPUTS = ("table", "json", "wide", "short", "yaml")


@dataclass(slots=True)
class Globals:
    """The global flags, wherever on the line they stood; the last one given wins. None: not given."""

    namespace: str | None = None
    mesh: str | None = None
    output: str | None = None
    verbose: bool = False
    context: str | None = None
    kubeconfig: str | None = None
    as_user: str | None = None
    as_groups: tuple[str, ...] = ()
    all_namespaces: bool = False
    selector: str | None = None
    mesh_from_environment: bool = False
    """True if `mesh` is $MANTLE_MESH: a flag that names a cluster then outweighs it."""

    @property
    def cluster_flags(self) -> tuple[str, ...]:
        """The flags given that mean a cluster, as they are written."""
        given = {"--context": self.context, "--kubeconfig": self.kubeconfig, "--as": self.as_user}
        return (*(name for name, value in given.items() if value is not None), *(["--as-group"] * bool(self.as_groups)))

    def refuse_selection(self, but: str = "") -> None:
        """Raises a usage error for `-A` and `-l`, unless `but` has its letter: a flag that would be passed over in
        silence means more than was asked for.
        """
        flags = ("A", self.all_namespaces, "--all-namespaces"), ("l", self.selector is not None, "--selector")
        for letter, given, name in flags:
            if given and letter not in but:
                raise click.UsageError(f"{name} is not possible here")

    def output_of(self, *allowed: str) -> str:
        """The output format, one of `allowed`, of which the first is the default. Raises a usage error otherwise."""
        if self.output is None:
            return allowed[0]
        if self.output not in allowed:
            raise click.UsageError(f"--output {self.output} is not possible here; use one of: {', '.join(allowed)}")
        return self.output


def mesh_command(
    name: str | None = None, *, on_a_cluster: str = "", selects: str = "", **attrs: Any
) -> Callable[[Callable[..., Any]], click.Command]:
    """Makes a command of `mantle` from a function `(globals, …)`; `attrs` are those of `click.command`.

    `on_a_cluster`: the command is for this machine only, and this is what does the same on a cluster. `selects`: which
    of `-A` and `-l` it takes (`A`, `l` or `Al`); the others are refused.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        def run(flags: Globals, *args: Any, **kwargs: Any) -> Any:
            flags.refuse_selection(selects)
            if on_a_cluster and flags.cluster_flags:
                raise click.UsageError(
                    f"{flags.cluster_flags[0]}: this command is for a mesh on this machine; "
                    f"on a cluster use `{on_a_cluster}`"
                )
            return function(flags, *args, **kwargs)

        return click.command(name, cls=MeshCommand, **attrs)(click.pass_obj(functools.update_wrapper(run, function)))

    return decorate


class MeshCommand(click.Command):
    """A command that takes the global flags too, so that they may stand behind it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_global_options())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _format_options(self, ctx, formatter)


class MeshSubgroup(click.Group):
    """A command with commands below it, made with `mesh_command`; the global flags may stand before and behind them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_global_options())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


class MeshGroup(click.Group):
    """The `mantle` command: finds commands in the table without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module_name, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module_name), attribute)
        if not isinstance(command, click.Command):  # a bug in that module, not the user's fault
            raise TypeError(f"{module_name}:{attribute} is not a command")
        command.name = cmd_name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(_unknown_command(args[0]), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in COMMANDS.items()])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


def _unknown_command(word: str) -> str:
    import difflib

    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"commands are: {', '.join(COMMANDS)}"
    return f"there is no command {word!r}; {hint}"


class _Option(click.Option):
    """Takes `-o=json` as kubectl does; click alone takes the `=` for a part of the value."""

    def consume_value(
        self, ctx: click.Context, opts: Mapping[str, click.Parameter]
    ) -> tuple[Any, click.core.ParameterSource]:
        value, source = super().consume_value(ctx, opts)
        return value.removeprefix("=") if isinstance(value, str) else value, source


def _global_options(*, top: bool = False) -> list[click.Option]:
    """Fresh option objects for one command. Values go to `Globals` only when given, so either place works.

    The environment is read at the `top` only: behind the command it would win over a flag before it.
    """

    def store(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
        def callback(ctx: click.Context, param: click.Parameter, value: Any) -> None:
            flags = ctx.ensure_object(Globals)
            if field == "as_groups":  # kubectl adds them up, wherever they stand
                flags.as_groups += value
            elif value is not None and value is not False:
                setattr(flags, field, value)
                if field == "mesh":
                    source = ctx.get_parameter_source("mesh")
                    flags.mesh_from_environment = source is click.core.ParameterSource.ENVIRONMENT

        return callback

    def option(field: str, *names: str, **attrs: Any) -> click.Option:
        return _Option([field, *names], expose_value=False, callback=store(field), **attrs)

    return [
        option("namespace", "-n", "--namespace", metavar="NAME", help="Namespace of the objects (default: default)."),
        option("all_namespaces", "-A", "--all-namespaces", is_flag=True, help="All namespaces instead of one."),
        option("selector", "-l", "--selector", metavar="LABELS", help="Only objects with these labels (a=b,c!=d)."),
        option(
            "mesh",
            "--mesh",
            metavar="NAME",
            envvar="MANTLE_MESH" if top else None,
            help="Which mesh of this machine (default: the only one).",
        ),
        option("context", "--context", metavar="NAME", help="Which cluster: a context of the kubeconfig."),
        option("kubeconfig", "--kubeconfig", metavar="FILE", help="The kubeconfig (default: as kubectl)."),
        option("as_user", "--as", metavar="USER", help="Ask the cluster as this user."),
        option("as_groups", "--as-group", metavar="GROUP", multiple=True, help="Ask as this group, too."),
        option("output", "-o", "--output", type=click.Choice(OUTPUTS), help="Output format, where there are several."),
        option("verbose", "-v", "--verbose", is_flag=True, help="Say more, with a traceback if there is a bug."),
    ]


GLOBAL_NAMES = frozenset(option.name for option in _global_options())


def _format_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    own: list[tuple[str, str]] = []
    shared: list[tuple[str, str]] = []
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None:
            (shared if param.name in GLOBAL_NAMES else own).append(record)
    for title, records in (("Options", own), ("Global options, before or after the command", shared)):
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


@click.group(
    cls=MeshGroup,
    params=[*_global_options(top=True)],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(mantle.__version__, "--version", message="mantle %(version)s")
def cli() -> None:
    """Automatic mutual TLS between workloads: on this machine and on Kubernetes."""


def main() -> None:
    """The entry point. Turns every outcome into one message and an exit code."""
    verbose = any(word in ("-v", "--verbose") for word in sys.argv[1:])
    try:
        result = cli.main(prog_name="mantle", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except click.ClickException as error:  # usage errors and `Failure`
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:  # the reader (head, less) left: not worth a word
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:  # ours to fix, so say so; the traceback is for whoever asked for it
        if verbose:
            raise
        Failure(
            f"a bug in mantle: {type(error).__name__}: {error}",
            fix="run the command again with --verbose and report what it prints",
        ).show()
        code = 1
    sys.exit(code)
