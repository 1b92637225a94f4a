"""Models that come in: ours and those of other libraries, read as the configuration and the tensors of an `Encoder`."""
