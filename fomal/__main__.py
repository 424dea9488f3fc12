"""`python -m fomal` is the command `fomal`."""

from fomal.cli import main

if __name__ == "__main__":
    main()
