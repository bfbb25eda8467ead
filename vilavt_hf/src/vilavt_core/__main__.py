"""``python -m vilavt_core``: the command `vilavt`."""

from .cli import main

if __name__ == "__main__":
    main()
