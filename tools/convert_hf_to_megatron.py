#!/usr/bin/env python3
"""`dsrl convert hf-to-megatron` as a script; see its --help. Under torchrun, several processes share the work."""

import sys

from megatron_dsrl.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
