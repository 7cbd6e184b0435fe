"""Programs on top of the backend: the command line, its demo and benchmark, and saved repros."""
