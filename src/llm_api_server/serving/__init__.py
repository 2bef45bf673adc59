"""Starts the API workers, under uvicorn or gunicorn, and prepares a first run."""
