"""The subcommands of `vilavt` that evaluate."""
