"""The checkpoint directory: write, verify, read, keep."""
