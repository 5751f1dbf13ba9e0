"""Which process is this, and does it still run?

For claims and temporary files that outlive their maker. A process id alone is not a name: ids are
used again, after a reboot and in a restarted container at once.
"""

from __future__ import annotations

from pathlib import Path


def boot_id() -> str:
    """This boot of this machine's kernel (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def name_of(pid: int) -> str:
    """A process's name: its id and its start in ticks since boot; empty when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # the command's name, which may hold anything, ends at the last parenthesis (proc(5))
    start_ticks = stat.rpartition(")")[2].split()[19]
    return f"{pid}-{start_ticks}"


def is_alive(name: str) -> bool:
    """Whether the process of that name still runs."""
    pid = name.partition("-")[0]
    return pid.isdigit() and name_of(int(pid)) == name
