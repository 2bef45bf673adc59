"""What a reload changes, as the command line shows it."""

from __future__ import annotations

import msgspec

from llm_api_server.ipc.messages import Reloaded


def as_json(reloaded: Reloaded) -> str:
    content = {"applied": reloaded.applied, "late_workers": reloaded.late, "changes": reloaded.changes}
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()


def as_text(reloaded: Reloaded) -> str:
    """A line for each change, and what was done."""
    if not reloaded.changes:
        return "Nothing changes."
    lines = [str(change) for change in reloaded.changes]
    if not reloaded.applied:
        return "\n".join([*lines, "Nothing was changed yet: this was a dry run."])
    if reloaded.late:
        lines.append(f"{reloaded.late} workers do not follow yet; the server's log says more.")
    waiting = sum(change.effect == "restart" for change in reloaded.changes)
    if waiting:
        lines.append(f"Applied, except for {waiting} that only a restart of the server changes.")
    else:
        lines.append("Applied.")
    return "\n".join(lines)
