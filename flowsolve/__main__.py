"""`python -m flowsolve`: the command line."""

from flowsolve.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
