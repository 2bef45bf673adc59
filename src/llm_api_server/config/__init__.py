"""The configuration: its declaration, how a file is loaded and checked, how it is shown and compared."""
