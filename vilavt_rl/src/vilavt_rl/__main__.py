"""``python -m vilavt_rl``."""

from .cli import main

main()
