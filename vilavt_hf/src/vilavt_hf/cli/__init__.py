"""The subcommands of `vilavt` that need a model of transformers."""
