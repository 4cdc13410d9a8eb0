"""The logger ``moe_inductor`` and the summary line.

Nothing is configured at import: no handler and no level.  ``TORCH_LOGS="+moe_inductor"`` (``-moe_inductor`` for
silence), ``logging.basicConfig`` and a level set on the logger all work because this module only reads what they did.
"""

from __future__ import annotations

import logging

log = logging.getLogger("moe_inductor")


def announce(line: str) -> None:
    """Show one INFO line to a user who configured nothing; otherwise do what the configuration says.

    A plain ``log.info`` would be lost: the root logger's default level is WARNING.  So the line is shown unless
    somebody asked for less: a level on our logger decides alone, and failing that a root logger quieter than default.
    """
    if log.level != logging.NOTSET:
        wanted = log.isEnabledFor(logging.INFO)
    else:
        root = logging.getLogger()
        wanted = root.level <= logging.WARNING and log.manager.disable < logging.INFO
    if not wanted:
        return
    record = log.makeRecord(log.name, logging.INFO, __file__, 0, line, (), None, "announce")
    if log.hasHandlers():
        log.handle(record)
    elif log.filter(record):
        # Nobody configured logging.  Made anew each time, so that a redirected sys.stderr is honoured.
        logging.StreamHandler().handle(record)
