"""Writes docs/cli.md: the `--help` of every subcommand. `make docs` runs it."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from edge_slm.cli import main

HEAD = """# The command line

What `--help` prints, checked by the tests. `make docs` writes it anew.
"""


def render() -> str:
    sections = [HEAD]
    for name in ("", *main.list_commands(None)):  # type: ignore[arg-type]
        arguments = [*name.split(), "--help"]
        result = CliRunner().invoke(
            main, arguments, prog_name="edge-slm", env={"COLUMNS": "80"}, catch_exceptions=False
        )
        title = " ".join(["edge-slm", *name.split()])
        sections.append(f"## `{title}`\n\n```text\n{result.output.rstrip()}\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(render(), encoding="utf-8")
