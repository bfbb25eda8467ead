"""The method of ViLaVT and the `vilavt` command, without torch and transformers: turns, regions, episodes, scores,
checkpoints as files. `docs/architecture.md` says which module is what.
"""
