"""The sections of `benchmarks/overhead.py`: each has `measure(quick)`, a record, and `table(record)`, its lines."""
