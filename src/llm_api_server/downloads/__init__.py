"""Downloads of models: the source, the choice of files, one hub each, the transfer, and the configuration entry.

No hub's library is imported by a worker or the manager.
"""
