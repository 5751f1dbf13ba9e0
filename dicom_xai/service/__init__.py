"""The roles, each a process (`receiver`, `worker`, `sender`), and their `supervisor`.

`role` holds what they share: start, readiness, reload on SIGHUP, stop on SIGTERM. A role reads
ledger and spool, hands their verbs to its stage, and keeps no state that matters.
"""
