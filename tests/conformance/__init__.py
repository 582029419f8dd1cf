"""The contract of channel layers, run against ours."""
