"""`oribi verify FILE|FOLDER|http://HOST/v1`."""

from pathlib import Path
from typing import Annotated

import typer

from oribi.cli.output import Json, Output, chatter_aside


def verify(
    target: Annotated[
        str,
        typer.Argument(
            help="GGUF file, folder of a checkpoint or an adapter, or a server's address with /v1."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="The server's name of the model (default: its only one).")
    ] = None,
    probes: Annotated[
        Path | None,
        typer.Option(help="probes.json of the export, or its folder (default: beside the target)."),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(help="Name or form of the exported file that answers, if the export has several."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base of an adapter: a folder, or a GGUF file for a GGUF adapter.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="The server's API key.")] = None,
    json: Json = False,
) -> None:
    """Check that a file or a server answers as the tuned model.

    It compares weights, template and stop tokens, and says what is wrong if one of them is not the tuned model's.
    """
    with chatter_aside():
        from oribi.save.check import overall, verdict
        from oribi.verify.call import verify_target

        checks = verify_target(target, probes=probes, file=file, model=model, base=base, api_key=api_key)
    out = Output(json)
    for check in checks:
        out.text(check.line())
        out.record(**check.to_json())
    out.text(f"{target}: {verdict(checks)}")
    out.record(target=target, outcome=str(overall(checks)), passed=all(check.passed for check in checks))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
