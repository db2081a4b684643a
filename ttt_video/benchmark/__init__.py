"""What ``tools/benchmark.py`` measures: one file per thing that is measured, and shared clocks."""
