"""What each command does as a whole."""
