"""The networks of the experiments, but for those that one of them has to itself."""
