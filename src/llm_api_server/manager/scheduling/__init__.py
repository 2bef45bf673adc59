"""Decides which model is loaded where, and which request runs next. Pure."""
