"""healpass: FP32's accuracy from 16-bit tensor cores, and with `exact` one answer everywhere.

The public names. Importing this costs nothing beyond torch; the backend itself needs no import at
all.
"""

from healpass.api import explain, inductor_options
from healpass.config import Debug, HealConfig
from healpass.errors import HealError
from healpass.report import HealReport
from healpass.status import Status, status

__all__ = [
    "Debug",
    "HealConfig",
    "HealError",
    "HealReport",
    "Status",
    "explain",
    "inductor_options",
    "status",
]
__version__ = "0.1.0"
