"""Everything that tells one array library from another, so that the rest is written once against the array API."""
