"""The `swarm` command. Each subcommand is a module of this package, imported only when it is needed."""

from __future__ import annotations

import importlib

import click

COMMANDS = (
    "demo",
    "init",
    "join",
    "train",
    "generate",
    "serve",
    "status",
    "pause",
    "resume",
    "export",
    "report",
    "id",
    "invite",
    "revoke",
    "families",
)
_MODULES = {"report": "run_report"}  # report.py is what all commands print with
_PACKAGE = "swarm.cli"


class LazyGroup(click.Group):
    """Finds the command NAME as `swarm.cli.NAME.command`; nothing heavy is imported before a command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None if there is no such."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"{_PACKAGE}.{_MODULES.get(cmd_name, cmd_name)}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"{_PACKAGE}.{cmd_name}.command is not a click command")
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("-v", "--verbose", count=True, help="Log what happens; twice for everything.")
@click.version_option(package_name="swarmtune")
def main(verbose: int) -> None:
    """Train and serve one large language model together, peer to peer, without a server.

    \b
    Try it on this machine alone:   swarm demo
    Start a run of your own:        swarm init tales --model HuggingFaceTB/SmolLM2-135M-Instruct
                                    swarm join tales/
    """
    from swarm.cli.report import set_up_logging, stop_on_signals

    set_up_logging(verbose)
    stop_on_signals()


if __name__ == "__main__":
    main()
