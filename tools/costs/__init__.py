"""The measurements of ``tools/measure_costs.py``: one file for each, and shared clocks."""
