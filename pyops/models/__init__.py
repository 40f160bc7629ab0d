"""Models that the methods run on: decoders, and the networks of the papers. None is here yet."""
