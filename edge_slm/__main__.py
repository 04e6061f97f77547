"""`python -m edge_slm`: the command line where a program wants a module, as torchrun does."""

from edge_slm.cli import main

if __name__ == "__main__":
    main(prog_name="edge-slm")
