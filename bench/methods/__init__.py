"""The methods on whole models: one bench_<method>.py a method, run by `python -m fastops bench <method>`."""
