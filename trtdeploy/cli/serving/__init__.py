"""The commands around a model repository and its server."""
