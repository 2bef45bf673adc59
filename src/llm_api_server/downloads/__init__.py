"""Getting models: what to take (`source.py`, `choice.py`), from where (a `hub.py` each), safely (`pull.py`), and their
entry in the file (`entry.py`, `config_edit.py`). Nothing of it runs in a worker or in the manager's own process.
"""
