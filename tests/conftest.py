"""One thread: the tensors of these tests are tiny, and the order of a sum must not depend on the number of cores."""

import torch

torch.set_num_threads(1)
