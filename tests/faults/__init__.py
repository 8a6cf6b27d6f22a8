"""Faults, injected for real: processes killed and stopped, files cut and flipped, disks filled."""
