"""The differences between array libraries; all other code is written once, for the array API."""
