"""The networks where they run: device and dtype, torch's arrays or numpy's, rows as the decoding loop takes them."""
