"""Ablations as one command: `semantica sweep`, a grid of training runs, each evaluated at several guidances.

Own code and not a library: Hydra's multirun composes the same grid but starts every job anew in a folder of its own,
Optuna and Ray Tune search, drawing and stopping trials, where an ablation needs every cell with the same seeds, and Ray
Tune resumes from pickles, which nothing here reads. A sweep is a product of `semantica train` commands that each resume
by themselves, so that what is left to write is the check of a description, a table and a page; of Ray its core is used,
to place cells in a cluster.
"""
