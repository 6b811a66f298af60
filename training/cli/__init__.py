"""The command line of ``python -m training``: one module a command."""
