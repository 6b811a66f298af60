"""What INT8 costs in accuracy, measured on real data; each module is a command: ``python -m benchmarks.accuracy.NAME``.

Each writes ``benchmarks/results/accuracy/NAME.json``; ``python -m benchmarks.accuracy.tables`` renders them all into
``docs/accuracy.md``.
"""
