"""The library `heal`, in which composite operators are defined. All wings of `ops` import it."""

import torch

library = torch.library.Library("heal", "FRAGMENT")
