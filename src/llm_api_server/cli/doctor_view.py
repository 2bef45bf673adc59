"""What `llm-api-server doctor` found, as lines or JSON."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from llm_api_server.cli.doctor_checks import Finding
from llm_api_server.redaction import one_line


def as_text(findings: Sequence[Finding]) -> str:
    """A line for each, below it what to do, and the sum."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:8}  {finding.name.ljust(width)}  {one_line(finding.message)}")
        if finding.advice:
            lines.append(f"{'':8}  {'':{width}}  -> {one_line(finding.advice)}")
    return "\n".join([*lines, "", _sum(findings)])


def as_json(findings: Sequence[Finding]) -> str:
    content = {"checks": findings, "problems": _count(findings, "problem"), "warnings": _count(findings, "warning")}
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()


def _sum(findings: Sequence[Finding]) -> str:
    parts = [
        f"{count} {word}{'' if count == 1 else 's'}"
        for word in ("problem", "warning")
        if (count := _count(findings, word))
    ]
    return f"{', '.join(parts)}." if parts else "Everything is in order."


def _count(findings: Sequence[Finding], verdict: str) -> int:
    return sum(finding.verdict == verdict for finding in findings)
