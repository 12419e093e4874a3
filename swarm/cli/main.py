"""The `swarm` command. Each subcommand is a module of this package, imported only when it is needed."""

from __future__ import annotations

import difflib
import importlib

import click

from swarm.cli.stopping import Stopped, stop_on_signals

COMMANDS = {
    "demo": "Watch a whole swarm on this machine train and generate.",
    "init": "Make a run: write NAME/swarm.toml and the run's key.",
    "join": "Hold blocks of a run's model for others.",
    "train": "Train the run's adapter on your data.",
    "generate": "Continue a prompt with the run's model.",
    "serve": "Serve text over HTTP: OpenAI's API, and a page to chat.",
    "status": "Show who holds what, and how far the run is.",
    "pause": "Let the peers on this machine rest.",
    "resume": "Let them take part again.",
    "export": "Write the newest adapter as a peft directory.",
    "publish": "Have hosts serve a finished adapter by its name.",
    "report": "Draw what peers have measured, on one page.",
    "id": "Print the peer id of this machine.",
    "invite": "Let somebody into a private run.",
    "revoke": "Put somebody out of a private run.",
    "doctor": "Check what usually goes wrong, and say what to do.",
    "families": "Try which families of models work.",
}
"""The commands in the order in which a newcomer meets them, each in a few words: a line of `swarm --help`."""
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
        command.short_help = COMMANDS[cmd_name]
        return command

    def invoke(self, ctx: click.Context) -> object:
        """As click does it. A signal that comes before the command itself, which imports for a while, ends it alike.

        Raises:
            SystemExit: with 130 after Ctrl-C, 143 after SIGTERM.
        """
        stop_on_signals()  # here, as click imports the command before it calls `main`
        try:
            return super().invoke(ctx)
        except Stopped as stopped:
            click.echo("stopped", err=True)
            raise SystemExit(stopped.exit_code) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, which knows of no commands that are not imported yet.

        Raises:
            click.UsageError: there is no such command; names one that was probably meant.
        """
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and near:
            raise click.UsageError(f"No such command '{args[0]:.40}'; did you mean '{near[0]}'?", ctx)
        return super().resolve_command(ctx, args)


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
    from swarm.cli.report import set_up_logging

    set_up_logging(verbose)


if __name__ == "__main__":
    main()
