"""Evaluation: benchmarks as data, runs on any backend, scores that mean the same everywhere.

What a benchmark is stands in one YAML file (`benchmark`), `questions` reads its records and builds the prompts,
`scoring` scores a file of results, `comparison` tests one run against another.
"""
