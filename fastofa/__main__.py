"""python -m fastofa COMMAND ... is fastofa COMMAND ..."""

from fastofa.cli import main

if __name__ == "__main__":
    main()
