"""Dashboard, alerts and the page of metrics speak of metrics that exist; Prometheus itself reads the rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from scripts.dashboard import dashboard
from scripts.metrics_page import page

from llm_api_server.manager.telemetry.metrics import METRICS, PREFIX
from tests.needs import missing
from tests.running import ROOT

ALERTS = ROOT / "deploy/prometheus/alerts.yml"
LABELS = {metric.name: set(metric.labels) for metric in METRICS}
#: What Prometheus itself adds.
ADDED = {"le", "instance", "job"}


def expressions() -> list[str]:
    drawn = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return [
        *drawn,
        *(rule["expr"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]),
    ]


def series(metric_name: str) -> str:
    """The metric of a series: histograms have three of them."""
    for metric in METRICS:
        suffixes = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        if metric_name in {metric.name + suffix for suffix in suffixes}:
            return metric.name
    raise AssertionError(f"{metric_name} does not exist")


@pytest.mark.parametrize("expression", expressions())
def test_expressions_name_metrics_and_labels_that_exist(expression: str) -> None:
    names = re.findall(rf"{PREFIX}\w+", expression)
    allowed = set.union(ADDED, *(LABELS[series(name)] for name in names))
    used = {label for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(", ")}
    used |= {
        label for matchers in re.findall(r"\{([^}]*)\}", expression) for label in re.findall(r"(\w+)[=!]", matchers)
    }
    assert used <= allowed
    assert names or "up{" in expression


def test_generated_files_are_current() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == page(), "python scripts/metrics_page.py > docs/metrics.md"
    found = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
    assert found == dashboard(), "python scripts/dashboard.py > deploy/grafana/dashboard.json"


@pytest.fixture
def promtool() -> str:
    return shutil.which("promtool") or missing("promtool", "promtool is not installed (apt-get install prometheus)")


def test_prometheus_reads_all_expressions(promtool: str, tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(expressions())
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    for file in (ALERTS, tmp_path / "rules.yml"):
        done = subprocess.run([promtool, "check", "rules", str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


CASES = """
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'llm_api_server_model_state{model="a",state="failed"}', values: '1x20'}
      - {series: 'llm_api_server_model_state{model="b",state="ready"}', values: '1x20'}
      - {series: 'llm_api_server_store_up', values: '0x20'}
      - {series: 'llm_api_server_requests_total{status="200"}', values: '0+90x20'}
      - {series: 'llm_api_server_requests_total{status="503"}', values: '0+10x20'}
      - {series: 'llm_api_server_requests_waiting{model="a"}', values: '30x20'}
    alert_rule_test:
      - eval_time: 15m
        alertname: LLMModelFailed
        exp_alerts:
          - exp_labels: {severity: critical, model: a}
            exp_annotations:
              summary: model a does not load
              description: "`llm-api-server models list` shows the engine's reason."
      - eval_time: 15m
        alertname: LLMStoreDown
        exp_alerts:
          - exp_labels: {severity: critical}
            exp_annotations:
              summary: the database cannot be used
              description: Keys from the configuration keep working; usage is kept and written later.
      - eval_time: 15m
        alertname: LLMServerErrors
        exp_alerts:
          - exp_labels: {severity: warning}
            exp_annotations:
              summary: 10% of requests fail
              description: llm_api_server_errors_total counts them by code.
      - eval_time: 15m
        alertname: LLMQueueGrows
        exp_alerts:
          - exp_labels: {severity: warning, model: a}
            exp_annotations:
              summary: 30 or more requests have been waiting for a for 10 minutes
              description: Raise inference.max_batch_size, add an instance, or limit keys.
      - {eval_time: 15m, alertname: LLMModelsThrash, exp_alerts: []}
"""


def test_alerts_fire_when_they_should(promtool: str, tmp_path: Path) -> None:
    shutil.copy(ALERTS, tmp_path)
    (tmp_path / "cases.yml").write_text(CASES)
    done = subprocess.run(
        [promtool, "test", "rules", "cases.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
