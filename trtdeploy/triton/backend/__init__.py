"""Models of Triton's Python backend: each file is copied into a repository and runs inside the server."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""Where the files to copy are; nothing here imports them, for what they import only the server has."""
