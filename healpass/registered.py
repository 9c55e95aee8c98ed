"""What torch loads for `backend="heal"`: the backend, and the watch over what it never gets.

A frame that torch cannot trace never reaches a backend. So the hooks that notice it are registered
when torch looks the name up, before anything is compiled. `import healpass` does not come here.
"""

from healpass.backend import heal_backend
from healpass.watch import keep_watch

__all__ = ["heal_backend"]

keep_watch()
