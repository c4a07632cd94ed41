"""`doctor`: what this machine has of what is needed, and what to do about what is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look at versions, devices and packaged models, and say what will not work and what to do.

    Exit code 1 if something will not work; what is only slower or may be missing is noted.
    """
    from glp_lens.doctor import examine, problems

    checks = examine()
    wrong = problems(checks)
    if as_json:
        typer.echo(json.dumps({"ok": not wrong, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        from ._doctor import show

        show(checks)
    if wrong:
        raise typer.Exit(1)
