"""The contestants of ``benchmarks/methods.py``, one file a family of methods."""
