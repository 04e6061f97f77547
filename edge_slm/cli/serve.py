"""`edge-slm serve`: a model over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path

import click

import edge_slm
from edge_slm.cli.console import examples, note, say, warn
from edge_slm.cli.options import bundle_type, default_bundle, engine_options
from edge_slm_runtime.errors import DependencyMissing


@click.command(
    short_help="Serve a model over HTTP.",
    epilog=examples("serve", "serve my-bundle --port 9000 --rows 16", "serve --host 0.0.0.0"),
)
@click.argument("bundle", type=bundle_type, default=default_bundle)
@engine_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Answers that are written at a time.",
)
@click.option(
    "--waiting",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Requests that may wait for that; further ones are told to come again (429).",
)
@click.option(
    "--api-key",
    envvar="EDGE_SLM_API_KEY",
    show_envvar=True,
    help="Asked of every caller.",
)
@click.option(
    "--cors",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Whose pages may call, such as https://example.org; repeatable.  [default: nobody's]",
)
def serve(
    *,
    bundle: Path,
    engine: str,
    precision: str,
    threads: int | None,
    host: str,
    port: int,
    rows: int,
    waiting: int,
    api_key: str | None,
    origins: tuple[str, ...],
) -> None:
    """Serve BUNDLE over HTTP: OpenAI's endpoints, a plain one, and a page to try it.

    /v1/models, /v1/completions and /v1/chat/completions are those of OpenAI, with the settings
    of 'generate' as further fields; /v1/prompts is our own; / is the page, /health and /metrics
    are for those who watch over it. A client that leaves ends the work on its answers.

    Prints the address once it is listening. SIGTERM or Ctrl-C ends it: answers under way have
    10 seconds.
    """
    try:
        from edge_slm.serve import serve as run
    except ImportError as error:
        raise DependencyMissing(
            f"serving needs {error.name}", "pip install 'edge-slm[serve]'"
        ) from None
    with edge_slm.load(bundle, engine=engine, precision=precision, threads=threads) as slm:

        def ready(address: str, local: bool) -> None:
            say(address)
            sys.stdout.flush()
            note(f"{slm!r}; Ctrl-C ends it")
            if not (api_key or local):
                warn("anybody who reaches this address may use it: --api-key asks for a key")

        run(
            slm,
            host,
            port,
            rows=rows,
            waiting=waiting,
            api_key=api_key,
            origins=origins,
            ready=ready,
        )
