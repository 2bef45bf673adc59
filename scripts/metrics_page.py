"""Print docs/metrics.md from the declared metrics: `python scripts/metrics_page.py > docs/metrics.md`."""

from __future__ import annotations

import sys

from llm_api_server.manager.telemetry.metrics import METRICS

_HEAD = """\
# Metrics

`GET /metrics` returns Prometheus' text format and needs a key with the permission `metrics`. Every API worker returns
the metrics of the whole server, because all workers report to the manager, which counts. A request that ended on
another worker is counted within half a second. A new manager starts from zero, as Prometheus expects after a restart.

```yaml
scrape_configs:
  - job_name: llm-api-server
    authorization: {credentials: sk-...}   # llm-api-server keys create --name prometheus --permission metrics
    static_configs: [{targets: ["localhost:8050"]}]
```

Alert rules are in `deploy/prometheus/alerts.yml`, a Grafana dashboard is in `deploy/grafana/dashboard.json`.

The engines' own metrics (`vllm:…`, `llamacpp:…`) follow those of the server, under their own names, with the label
`model` added. Labels have few values: configured models, engine endpoints, error codes, and at most the first
thousand keys.

| name | kind | labels | meaning |
| --- | --- | --- | --- |
"""


def page() -> str:
    lines = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} | {metric.help} |"
        for metric in METRICS
    ]
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
