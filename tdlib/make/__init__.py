"""What made the mini models under data/models. Nothing imports it but tests and the benchmark."""
