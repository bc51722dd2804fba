"""The cases of ``benchmarks/tabular.py``, a module each."""
