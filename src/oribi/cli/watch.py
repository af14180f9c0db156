"""`oribi watch [RUNS]`."""

from typing import Annotated

import typer

from oribi.cli.output import chatter_aside


def watch(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Run, or folder that holds runs (default: runs).")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port on 127.0.0.1 (default: 7860, or the next free one)."),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Follow and compare runs on a local page.

    It shows curves, samples, data, runs side by side, and a chat. The page is served on this machine only, to those who have the address with its token. It reads what runs write and changes
    nothing. Needs the extra `watch`: pip install "oribi[watch]".
    """
    from oribi.errors import ConfigError
    from oribi.watch.runs import Roots, Watched

    roots = Roots.of(runs or ["runs"])
    with chatter_aside():
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise ConfigError(f'oribi watch needs gradio ({error}); pip install "oribi[watch]"') from error
        from oribi.watch.server import serve_page
    serve_page(Watched(roots), port, open_browser)
