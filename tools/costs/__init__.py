"""The measurements of ``tools/measure_costs.py``, one file each, and what they share."""
