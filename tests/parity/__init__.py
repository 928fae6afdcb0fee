"""Compares this package with recordings of the reference implementation: `python -m tests.parity FOLDER`.

FOLDER is laid out like `tests/golden` (whose README describes the recordings). What is compared with what:

1. `recording.py`   one recording: its json, its tensors, and which of them are inputs
2. `bench.py`       the folder: its recordings, and its checkpoints, opened and loaded once
3. `scenarios.py`   a recorded call, answered again by the package's own pipeline
4. `stages.py`      its stages: writing, drawing
5. `watch.py`       what the pipeline feeds its networks, read off with hooks
6. `judging.py`     which of it is compared how, and what a router tie excuses
7. `components.py`  a recorded part (a table: component name -> function)
8. `report.py`      tolerances, lines, totals, exit code, dump

Nothing recorded is ever fed in where the package can compute it.
"""
