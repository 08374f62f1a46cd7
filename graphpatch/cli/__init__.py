"""The command line: one file a command; `main` tells them apart. Nobody imports this room."""
