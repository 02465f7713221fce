"""What is computed: networks in plain torch; no files, no devices, no globals."""
