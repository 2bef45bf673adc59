"""`llm-api-server doctor`: looks at everything the server needs, changes nothing, and says what to do."""

from __future__ import annotations

import typer

from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.types import ExitCode


def doctor(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Check what the server needs: programs, devices, configuration, port, folders, database. Changes nothing."""
    from llm_api_server.cli import doctor_checks, doctor_view
    from llm_api_server.config.load import find_config

    findings = doctor_checks.examine(find_config(config).absolute())
    typer.echo(doctor_view.as_json(findings) if as_json else doctor_view.as_text(findings))
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(ExitCode.FAILED)
