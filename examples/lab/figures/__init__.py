"""The figures: kinds of them that experiments share, and those of one experiment."""
