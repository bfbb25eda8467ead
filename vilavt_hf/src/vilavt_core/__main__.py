"""``python -m vilavt_core``: the command `vilavt`."""

from .cli import main

main()
