"""`python -m gen_pipelines.testing` tries every scheduler of this library beside those of diffusers and prints the matrix.

    python -m gen_pipelines.testing                          ours beside diffusers', on seven kinds of network
    python -m gen_pipelines.testing --markdown               the same as a Markdown table
    python -m gen_pipelines.testing mypackage.file:MyClass   everything on a scheduler of your own; exits with 1 if something fails
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .beside import beside_diffusers
from .conformance import check_scheduler
from .report import Report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print to stdout (the progress goes to stderr), and return the exit status."""
    parser = argparse.ArgumentParser("python -m gen_pipelines.testing", description="Is a scheduler right on every kind of network?")
    parser.add_argument("scheduler", nargs="*", help="module:Class, one of yours or of diffusers; none compares ours with diffusers'")
    parser.add_argument("--markdown", action="store_true", help="print the matrix as a Markdown table")
    options = parser.parse_args(arguments)
    report = Report(())
    for name in options.scheduler:
        module, _, attribute = name.partition(":")
        if not attribute:
            parser.error(f"{name!r}: write module:Class, for instance diffusers:DDIMScheduler")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            parser.error(str(error))
        report += check_scheduler(found, progress=True)
    if not options.scheduler:
        report = beside_diffusers(progress=True)
    sys.stdout.write((report.markdown() if options.markdown else str(report) if options.scheduler else report.table()) + "\n")
    return int(bool(options.scheduler) and not report.passed)


if __name__ == "__main__":
    sys.exit(main())
