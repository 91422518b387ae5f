"""`python -m gen_pipelines`: the same as `gen-pipelines`, for torchrun and accelerate launch."""

import sys

from gen_pipelines.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
