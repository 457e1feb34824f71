"""One module a command of the command line; they arrange what the other packages do."""
