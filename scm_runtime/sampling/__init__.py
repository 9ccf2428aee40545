"""The loop from noise to samples, for one call and for requests that are computed together."""
