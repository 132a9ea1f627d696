"""Features: layers of a network, made small enough, for all images."""
