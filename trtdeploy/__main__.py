"""``python -m trtdeploy``."""

from trtdeploy.cli.main import main

if __name__ == "__main__":
    main()
