"""Triton: the model repository, the server, the client and the validation of what is served."""
