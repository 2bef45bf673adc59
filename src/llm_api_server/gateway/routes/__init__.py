"""The FastAPI routes: everything except requests to engines."""
