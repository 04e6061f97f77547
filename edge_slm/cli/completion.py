"""`edge-slm completion`: completion of commands, options and tasks in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from edge_slm.cli.console import examples

SHELLS = ("bash", "zsh", "fish")


@click.command(
    short_help="Print a script that completes commands, options, bundles and tasks.",
    epilog=examples(
        "completion bash >> ~/.bashrc",
        "completion zsh >> ~/.zshrc",
        "completion fish > ~/.config/fish/completions/edge-slm.fish",
    ),
)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script for SHELL that completes commands, options, bundles and tasks.

    The tasks are those of --bundle, if it stands before --task.
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click has all of SHELLS"
    script = kind(context.find_root().command, {}, "edge-slm", "_EDGE_SLM_COMPLETE")
    click.echo(script.source())
