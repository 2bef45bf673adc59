"""`python -m llm_api_server` is the command `llm-api-server`."""

from llm_api_server.cli.main import main

main()
