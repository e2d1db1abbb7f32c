"""The kernel's ABI: one module per subsystem, thin wrappers named as the calls, structures named as the kernel's.

Nothing here decides or retries; failures are OSError. What the running kernel has is told by features.py.
"""
