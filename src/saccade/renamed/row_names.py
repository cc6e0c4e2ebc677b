"""What measured rows had under other names: it works, and warns."""

from __future__ import annotations

import warnings
from typing import Any


class OldRowNames:
    """The old name of a row's ``value``, which is that of ``metric``, whichever it is."""

    value: Any

    @property
    def top1(self) -> Any:
        """The old name of ``value``."""
        warnings.warn(f"{type(self).__name__}.top1 is value now, of the row's metric", DeprecationWarning, stacklevel=2)
        return self.value
