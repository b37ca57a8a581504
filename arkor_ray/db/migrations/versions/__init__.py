"""One module per revision, each on top of the one before."""
