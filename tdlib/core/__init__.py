"""Tools that every package may use: whole files, paths, identities of results, target records, devices."""
