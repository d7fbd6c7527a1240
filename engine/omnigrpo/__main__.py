"""`python -m omnigrpo` is the command line."""

from omnigrpo.cli import main

if __name__ == "__main__":
    main()
