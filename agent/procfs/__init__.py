"""/proc as records: one module per file, text to NamedTuple, no decisions.

A task that is gone is always ProcessLookupError; text that makes no sense is ValueError.
"""
