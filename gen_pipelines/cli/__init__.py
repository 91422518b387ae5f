"""The command line: one module per verb, each with `build_parser()` and `run(args) -> int`.

No module here imports torch, or anything that does, at its top: `--help` and wrong arguments answer in a fraction of a second.
"""
