"""Print the Grafana dashboard: `python scripts/dashboard.py > deploy/grafana/dashboard.json`."""

from __future__ import annotations

import json
import sys
from typing import Any

from llm_api_server.manager.telemetry.metrics import PREFIX

_INTERVAL = "$__rate_interval"


def _sum(name: str, *by: str, verb: str = "", over: str = _INTERVAL) -> str:
    """Return the sum of a gauge, or with `verb` (rate, increase) of a counter."""
    series = f"{verb}({PREFIX}{name}[{over}])" if verb else PREFIX + name
    return f"sum by ({', '.join(by)}) ({series})"


def _rate(name: str, *by: str) -> str:
    return _sum(name, *by, verb="rate")


def _increase(name: str, *by: str) -> str:
    return _sum(name, *by, verb="increase")


def _quantiles(name: str, *percent: int) -> list[tuple[str, str]]:
    return [(f"histogram_quantile({p / 100}, {_rate(name + '_bucket', 'le')})", f"p{p}") for p in percent]


def _p95(name: str, by: str) -> list[tuple[str, str]]:
    return [(f"histogram_quantile(0.95, {_rate(name + '_bucket', 'le', by)})", f"{{{{{by}}}}} p95")]


def _mean(name: str, *by: str) -> str:
    total, count = (_sum(name + part, *by, verb="rate", over="1h") for part in ("_sum", "_count"))
    return f"{total} / {count}"


#: Panels: title, unit by Grafana's name, and expressions with their legends.
_PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("Requests", "reqps", [(_rate("requests_total", "status"), "{{status}}")]),
    ("Errors", "reqps", [(_rate("errors_total", "code"), "{{code}}")]),
    ("Tokens", "short", [(_rate("tokens_total", "kind"), "{{kind}}/s")]),
    ("Running and waiting requests", "short", [
        (_sum("requests_running", "model"), "{{model}}"),
        (_sum("requests_waiting", "model"), "{{model}} waiting"),
    ]),
    ("Time to first token", "s", _quantiles("time_to_first_token_seconds", 50, 95, 99)),
    ("Time between tokens", "s", _quantiles("inter_token_seconds", 50, 95)),
    ("Queue time", "s", _p95("queue_seconds", "model")),
    ("Request duration", "s", _p95("request_seconds", "endpoint")),
    ("Tokens by key", "short", [("topk(10, " + _rate("tokens_total", "key") + ")", "{{key}}/s")]),
    ("Rate limits hit", "short", [(_increase("limit_hits_total", "key", "limit"), "{{key}} {{limit}}")]),
    ("Models", "short", [(_sum("model_state", "model", "state"), "{{model}} {{state}}")]),
    ("Loads and unloads", "short", [
        (_increase("model_loads_total", "model", "result"), "{{model}} {{result}}"),
        (_increase("model_unloads_total", "model", "reason"), "{{model}} {{reason}}"),
    ]),
    ("Load time", "s", [(_mean("model_load_phase_seconds", "model", "phase"), "{{model}} {{phase}}")]),
    ("Aborted tokens", "short", [(_rate("aborted_tokens_total", "model"), "{{model}}/s")]),
    ("Device memory", "bytes", [
        (_sum('device_memory_bytes{kind!="total"}', "device", "kind"), "{{device}} {{kind}}"),
    ]),
    ("Memory", "bytes", [
        (_sum("process_memory_bytes", "process"), "{{process}}"),
        (_sum("model_memory_bytes", "model"), "{{model}}"),
    ]),
    ("CPU", "short", [(_rate("process_cpu_seconds_total", "process"), "{{process}}")]),
    ("Database", "short", [
        (f"min({PREFIX}store_up)", "up"),
        (f"max({PREFIX}store_waiting_reports)", "waiting reports"),
    ]),
]  # fmt: skip
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3


def dashboard() -> dict[str, Any]:
    """Return the dashboard in Grafana's JSON model."""
    return {
        "title": "LLM API Server",
        "uid": "llm-api-server",
        "tags": ["llm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": [_panel(number, *panel) for number, panel in enumerate(_PANELS)],
    }


def _panel(number: int, title: str, unit: str, series: list[tuple[str, str]]) -> dict[str, Any]:
    row, column = divmod(number, _COLUMNS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": name} for i, (expr, name) in enumerate(series)
        ],
    }


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=2)
    sys.stdout.write("\n")
