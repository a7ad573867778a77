"""How good a cached sampler is: fidelity, distributions, drift, reports."""
