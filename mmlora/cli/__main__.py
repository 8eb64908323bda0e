"""`python -m mmlora.cli`."""

from mmlora.cli.commands import main

if __name__ == "__main__":
    main()
