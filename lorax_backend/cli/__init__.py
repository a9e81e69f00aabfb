"""The command line: `lorax-triton serve` and `lorax-triton info`."""
