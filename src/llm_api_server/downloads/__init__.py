"""Getting models: what to take (`source.py`, `choice.py`), from where (a `hub.py` each), safely (`pull.py`), and their
entry in the file (`entry.py`, `config_edit.py`). No hub's library enters a worker or the manager.
"""
