"""`python -m gpt2` is the command `gpt2`."""

from gpt2.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
