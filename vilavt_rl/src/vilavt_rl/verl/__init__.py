"""ViLaVT in an unmodified verl (0.9): entry point, agent loop, dataset, reward, CPU mode.

Importing this package imports neither verl nor torch. `plugin` is what verl loads in each of its processes.
"""
