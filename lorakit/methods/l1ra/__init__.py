"""L1RA: L1-regularised rank assignment under a fixed budget."""
