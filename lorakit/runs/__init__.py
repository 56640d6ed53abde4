"""The commands: one function does all the work of a command."""
