"""Settings of gunicorn, from config.yaml or $LLM_API_SERVER_CONFIG: `gunicorn main:app -c gunicorn.conf.py`."""

from typing import Any

from llm_api_server.lifecycle.server_lock import KEEP_ALIVE_TIMEOUT
from llm_api_server.serving import gunicorn_hooks

_config = gunicorn_hooks.config_for_gunicorn()

bind = gunicorn_hooks.bind_address(_config.server)
workers = _config.server.workers
worker_class = "llm_api_server.gateway.http.gunicorn_worker.GunicornWorker"
keepalive = KEEP_ALIVE_TIMEOUT
graceful_timeout = int(_config.server.drain_timeout) + 5
# Seconds that a worker's event loop may be blocked. The limit of a request is server.timeout.
timeout = 60
forwarded_allow_ips = ",".join(_config.server.trusted_proxies)
control_socket = str(_config.run_dir / "gunicorn.ctl")
logconfig_dict = gunicorn_hooks.gunicorn_logging()


def on_starting(server: Any) -> None:
    gunicorn_hooks.on_gunicorn_start(server, _config)


def on_exit(server: Any) -> None:
    gunicorn_hooks.on_gunicorn_exit(server, _config)
