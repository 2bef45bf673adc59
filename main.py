"""`python main.py` is `llm-api-server serve`; `main:app` is the ASGI app for gunicorn and uvicorn."""

import sys

from llm_api_server.errors import ConfigError

if __name__ == "__main__":
    from llm_api_server.cli.main import main

    main(["serve", *sys.argv[1:]])
elif __name__ != "__mp_main__":  # workers of `python main.py` import this file again
    from llm_api_server.gateway.app import create_app

    try:
        app = create_app()
    except ConfigError as error:
        sys.exit(str(error))
