"""`swarm families`: which families of models work, found out by trying them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from swarm.cli.report import screen
from swarm.errors import BadConfig


@click.command(
    epilog="""\b
Examples:
  swarm families qwen3 mixtral
  swarm families --output docs/families.md""",
)
@click.argument("names", nargs=-1, metavar="[FAMILY]...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each family.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the table to this file, in Markdown.")
def command(names: tuple[str, ...], as_json: bool, output: Path | None) -> None:
    """Cut a tiny random model of each FAMILY, or of all that transformers has, and compare it with the whole.

    All of them take some minutes. Nothing is fetched.
    """
    with screen() as shown:
        from blocks.families import families_page, try_family
        from blocks.family_configs import family_names

        known = family_names()
        for name in names:
            if name not in known:
                raise BadConfig(f"transformers has no causal language model of the family '{name[:80]}'; see its docs")
        results = []
        for name in names or known:
            shown.now(f"trying {name}")
            results.append(try_family(name))
            if as_json:
                shown.data(asdict(results[-1]))
        if output is not None:
            try:
                output.write_text(families_page(results))
            except OSError as error:
                raise BadConfig(f"cannot write {output}: {error.strerror}; choose another --output") from error
        elif not as_json:
            rows = [
                (
                    result.family,
                    result.outcome,
                    "" if result.forward is None else f"{result.forward:.1e}",
                    "" if result.decode is None else f"{result.decode:.1e}",
                    result.detail,
                )
                for result in results
            ]
            shown.table("families", ("family", "outcome", "forward", "decode", "why"), rows)
