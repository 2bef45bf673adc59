"""Start of the API workers under uvicorn or gunicorn, and preparation of a first run."""
