"""How fast each operator is, beside its floor and its peers: one bench_<op>.py an op, run by `python -m fastops bench`.

timing.py takes the times, floors.py says what was possible, peers.py calls the competition, records.py keeps what was
found, report.py shows it; harness.py joins them and refuses to report what is not correct.
"""
