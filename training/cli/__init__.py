"""The command line of ``trtdeploy train``: one module a command."""
