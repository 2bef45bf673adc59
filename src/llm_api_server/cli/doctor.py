"""Command `doctor`: checks everything the server needs, changes nothing, and advises what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.redaction import one_line
from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from llm_api_server.cli.doctor_checks import Finding


def doctor(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Check programs, devices, configuration, port, folders and database. Changes nothing."""
    from llm_api_server.cli.doctor_checks import examine
    from llm_api_server.config.load import find_config

    findings = examine(find_config(config).absolute())
    counts = {word: sum(finding.verdict == word for finding in findings) for word in ("problem", "warning")}
    content = {"checks": findings, "problems": counts["problem"], "warnings": counts["warning"]}
    base.show(_as_text(findings, counts), content, as_json=as_json)
    if counts["problem"]:
        raise typer.Exit(ExitCode.FAILED)


def _as_text(findings: Sequence[Finding], counts: dict[str, int]) -> str:
    """Return a line for each finding with its advice below, and the counts."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:8}  {finding.name.ljust(width)}  {one_line(finding.message)}")
        if finding.advice:
            lines.append(f"{'':8}  {'':{width}}  -> {one_line(finding.advice)}")
    parts = [f"{count} {word}{'' if count == 1 else 's'}" for word, count in counts.items() if count]
    return "\n".join([*lines, "", f"{', '.join(parts)}." if parts else "Everything is in order."])
