"""One thread for torch: two take three times as long on tiny models, waiting for each other."""

import torch

torch.set_num_threads(1)
