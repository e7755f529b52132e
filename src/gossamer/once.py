"""Log lines that are said once."""

from __future__ import annotations

import logging
from functools import cache

log = logging.getLogger("gossamer")


@cache
def say(message: str) -> None:
    """Warn of it, once per message."""
    log.warning(message)
