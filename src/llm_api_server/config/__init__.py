"""The configuration: its one declaration, how a file becomes it, what is checked, how it is shown and compared."""
