"""A Chrome trace of every transfer, where ``RING_TRACE`` names a file for it."""
