"""`python -m fastofa COMMAND ...` does the same as `fastofa COMMAND ...`."""

from fastofa.cli import main

if __name__ == "__main__":
    main()
