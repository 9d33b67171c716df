"""The budgets of speed and size, measured: `nox -s bench`, or `python -m benchmarks [names]`.

Absolute figures do not hold on shared machines. So each figure stands beside a ceiling or a peer
that was measured in turn with it, and CPU time is taken as well as wall time.
"""
