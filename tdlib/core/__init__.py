"""What every package may use: whole files, paths, identities of results, records of targets, devices."""
