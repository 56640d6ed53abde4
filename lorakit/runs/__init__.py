"""Commands as a whole: one function does all the work of a command."""
