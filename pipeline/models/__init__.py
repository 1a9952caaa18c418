"""Loading, forward passes, packing, decoding, generation, adapters."""
