"""Injected faults: killed and stopped processes, truncated and corrupted files, full disks."""
