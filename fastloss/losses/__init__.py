"""The public losses, one file for each family."""
