"""`mantle completion SHELL`: the script that teaches a shell to complete `mantle`.

The script asks the program itself (click's protocol), so it never goes out of date.
"""

from __future__ import annotations

import click

from mantle.cli.main import Globals, cli, mesh_command
from mantle.cli.output import write

SHELLS = ("bash", "zsh", "fish")


@mesh_command()
@click.argument("shell", type=click.Choice(SHELLS))
def command(flags: Globals, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash: source <(mantle completion bash)
    zsh:  source <(mantle completion zsh)
    fish: mantle completion fish | source
    """
    flags.output_of("table")
    write(script(shell))


def script(shell: str) -> str:
    """The completion script for one of `SHELLS`."""
    from click.shell_completion import get_completion_class

    completion = get_completion_class(shell)
    if completion is None:  # SHELLS are exactly the ones click has
        raise LookupError(shell)
    # click's `source()` for bash runs bash to find its version; only the text is wanted here
    instance = completion(cli, {}, "mantle", "_MANTLE_COMPLETE")
    return instance.source_template % instance.source_vars()
