"""ViLaVT in an EasyR1 checkout: own entry point, dataset, rollout, worker and reward manager, all by subclass.

EasyR1's module is called ``verl`` like the other trainer's. Importing this package imports neither.
"""
