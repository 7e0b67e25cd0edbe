"""One file per command; each defines one function whose signature is the command line and whose docstring is its help."""
