"""The manager process: the only writer of model state. Starts, watches and stops engines; never imports one."""
