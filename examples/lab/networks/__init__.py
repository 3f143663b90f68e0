"""Networks of the experiments on images."""
