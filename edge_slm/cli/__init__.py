"""The command line: one file per subcommand, results on stdout, the rest on stderr."""

from __future__ import annotations

import click

import edge_slm
from edge_slm.cli import console
from edge_slm.cli.adapter import adapter
from edge_slm.cli.batch import batch
from edge_slm.cli.bench import bench
from edge_slm.cli.completion import completion
from edge_slm.cli.convert import convert
from edge_slm.cli.demo import demo
from edge_slm.cli.dequantise import dequantise
from edge_slm.cli.distill import distill
from edge_slm.cli.evaluate import evaluate
from edge_slm.cli.generate import generate
from edge_slm.cli.info import info
from edge_slm.cli.package import package
from edge_slm.cli.profile import profile
from edge_slm.cli.repack import repack
from edge_slm.cli.serve import serve
from edge_slm.cli.store import install, pack, prune, rollback, sign, trust
from edge_slm.cli.verify import verify

__all__ = ["main"]


@click.group(
    cls=console.Commands,
    epilog=f"{console.EXAMPLES}\n\n{console.EXIT_CODES}",
    commands=[
        *(demo, distill, convert, adapter, dequantise, repack, package, verify, info),
        *(install, rollback, prune, pack, sign, trust),
        *(generate, batch, serve, profile, bench, evaluate, completion),
    ],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(edge_slm.__version__, prog_name="edge-slm")
def main() -> None:
    """Small language models that obey commands, on the device.

    Results go to stdout, progress to stderr. '-' reads stdin. A failure is one
    line, 'error[code]: problem (what to do)', and an exit code of the list below.
    BUNDLE is a folder, or the name of an installed model ('edge-slm info' lists them).
    """
