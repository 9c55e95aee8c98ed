"""The torch that tests run with, where it decides what can be asked of it."""

import torch
from torch.torch_version import TorchVersion

#: The oldest that the package's metadata allow; CI's is 2.13.
AT_2_11 = TorchVersion(torch.__version__) < "2.12"
